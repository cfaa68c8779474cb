"""Looks through a Whisper model's file before whisper.cpp does, which trusts the lengths that it finds there."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from .faults import Unusable

MAGIC = b"lmgg"
_DIMENSIONS = 11
_LONGEST = 1 << 10  # bytes of a word or a name
_TYPES = {  # of ggml: elements of a block and its bytes
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
}  # fmt: skip


class _Reader:
    """Numbers one after the other; Unusable at the end of the file."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._place = 0

    def numbers(self, count: int, what: str) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", self.take(4 * count, what))

    def take(self, length: int, what: str) -> bytes:
        start = self.skip(length, what)
        return bytes(self._data[start : start + length])

    def skip(self, length: int, what: str) -> int:
        """Where it was; goes on behind it."""
        start = self._place
        if length < 0 or length > len(self._data) - start:
            raise Unusable(f"the model's file ends inside {what}: it is cut short or damaged")
        self._place += length
        return start

    @property
    def ended(self) -> bool:
        return self._place >= len(self._data)


def check(path: Path) -> bool:
    """Whether the model knows other languages than English; Unusable says what is wrong with its file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _check(_Reader(data), path.name)
    except (OSError, ValueError) as exc:
        raise Unusable(f"{path.name} cannot be read: {exc}") from exc


def _check(reader: _Reader, name: str) -> bool:
    found = reader.take(4, "its first bytes")
    if found != MAGIC:
        raise Unusable(f"{name} is no GGML file of Whisper: it starts with {found!r} instead of {MAGIC!r}")
    dimensions = reader.numbers(_DIMENSIONS, "its header")
    if not all(0 < n < 1 << 20 for n in dimensions[:-1]):
        raise Unusable(f"{name} is no GGML file of Whisper: its dimensions would be {list(dimensions)}")
    for state, heads in ((dimensions[2], dimensions[3]), (dimensions[6], dimensions[7])):
        if state % heads:
            raise Unusable(f"{name} is damaged: {heads} heads do not divide a width of {state}")
    mels, bins = reader.numbers(2, "the filters")
    if mels != dimensions[9] or not 0 < bins <= 1 << 12:
        raise Unusable(f"the filters of {name} do not fit its header: {mels} of {bins}")
    reader.skip(mels * bins * 4, "the filters")
    (words,) = reader.numbers(1, "the vocabulary")
    if not 0 < words <= dimensions[0]:
        raise Unusable(f"{name} has {words} words, its header says {dimensions[0]}")
    for _ in range(words):
        reader.skip(_bounded(reader.numbers(1, "the vocabulary")[0], "a word"), "the vocabulary")
    while not reader.ended:
        _check_tensor(reader)
    return dimensions[0] >= 51865


def _check_tensor(reader: _Reader) -> None:
    """Its head, and that its numbers are there; whether it belongs to this model the engine says."""
    ranks, length, kind = reader.numbers(3, "a tensor")
    if not 1 <= ranks <= 4 or kind not in _TYPES:
        raise Unusable(f"a tensor of the model has {ranks} dimensions and is of type {kind}: the file is damaged")
    shape = reader.numbers(ranks, "a tensor")
    name = reader.take(_bounded(length, "a tensor's name"), "a tensor's name")
    if not name.isascii() or not all(0 < n < 1 << 24 for n in shape):
        raise Unusable(f"a tensor of the model is called {name[:40]!r} and has the shape {list(shape)}")
    block, size = _TYPES[kind]
    reader.skip(math.prod(shape) // block * size, f"the tensor {name.decode()}")


def _bounded(length: int, what: str) -> int:
    if not 0 <= length <= _LONGEST:
        raise Unusable(f"{what} would be {length} bytes long: the file is damaged")
    return length
