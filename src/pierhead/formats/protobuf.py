"""Protocol-buffer fields of hostile bytes, one level at a time and without copies; knows no message."""

from __future__ import annotations

from collections.abc import Generator

MAX_FIELDS = 1_000_000  # of one level


class Bad(Exception):  # control flow: the caller decides what damage means
    """The bytes are not fields."""


def fields(data: bytes | memoryview) -> Generator[tuple[int, int | memoryview]]:
    """Field numbers with their values: integers, or the bytes of what has a length."""
    view = memoryview(data)
    at, end = 0, len(view)
    for _ in range(MAX_FIELDS):
        if at >= end:
            return
        key, at = _varint(view, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(view, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(view, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise Bad
        if length > end - at:
            if kind == 2:
                yield key >> 3, view[at:]  # cut short: what is there counts
            raise Bad
        yield key >> 3, view[at : at + length]
        at += length
    raise Bad


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    found = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise Bad
        byte = view[at]
        at += 1
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            return found, at
    raise Bad
