"""Reduces a JSON body to its short members while it arrives, so that the big ones need no decoding at once."""

from __future__ import annotations

import re

INLINE = 65536  # bodies up to this size are decoded where they arrive
_KEEP = 4096  # a string longer than this cannot be a model name
# All that can be copied at a stroke: what is outside of strings, and whole short strings with few escapes.
_PLAIN = re.compile(rb'(?:[^"]*+"[^"\\]{0,2048}+(?:\\.[^"\\]{0,256}+){0,8}+")*+[^"]*+', re.DOTALL)
_INSIDE = re.compile(rb"[^\"\\]*+(?:\\.[^\"\\]*+)*+", re.DOTALL)


def _end(data: bytes, pos: int) -> int:
    """Where the string ends that ``pos`` is in: at its quote, at a last byte that is a backslash, or after it."""
    quote = data.find(b'"', pos)
    stop = len(data) if quote < 0 else quote
    escape = data.find(b"\\", pos, stop)
    if escape < 0:  # as in an image
        return stop
    match = _INSIDE.match(data, escape)
    return match.end() if match is not None else escape


class Skeleton:
    """Copies JSON without the inside of its long strings, a piece at a time as the body arrives.

    An image of 20 MB leaves a few hundred bytes, which decode in microseconds; so no single step, on this thread or
    on another that holds the interpreter's lock, delays other streams.
    """

    __slots__ = ("_escaped", "_inside", "_length", "_out", "_string")

    def __init__(self) -> None:
        self._out: list[bytes] = []
        self._inside = False
        self._escaped = False
        self._length = 0
        self._string: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Take the next piece (best kept under 256 KiB)."""
        pos, end = 0, len(data)
        while pos < end:
            if self._inside:
                pos = self._rest_of_string(data, pos)
                continue
            match = _PLAIN.match(data, pos)
            stop = match.end() if match is not None else pos
            if stop < end:  # a string that is long, full of escapes, or ends in a later piece
                self._inside, self._length = True, 0
                stop += 1
            self._out.append(data[pos:stop])
            pos = stop

    def _rest_of_string(self, data: bytes, pos: int) -> int:
        """Read on inside a string; where to go on. Remembers a backslash at the end for the next piece."""
        start = pos
        if self._escaped:
            pos += 1
            self._escaped = False
        stop = _end(data, pos)
        if stop >= len(data) or data[stop] != 0x22:  # 0x22 is the quote; else a backslash that is the last byte
            self._escaped = stop < len(data)
            self._keep(data[start:])
            return len(data)
        self._keep(data[start:stop])
        self._out.extend(self._string)
        self._out.append(b'"')
        self._string.clear()
        self._inside = False
        return stop + 1

    def _keep(self, text: bytes) -> None:
        self._length += len(text)
        if self._length <= _KEEP:
            self._string.append(text)
        else:
            self._string.clear()

    def result(self) -> bytes:
        """The reduced document."""
        return b"".join(self._out)
