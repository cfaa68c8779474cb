"""Reduces a JSON body to its short members while it arrives, so that the big ones need no decoding at once."""

from __future__ import annotations

INLINE = 65536  # bodies up to this size are decoded where they arrive
_KEEP = 4096  # a string longer than this cannot be a model name


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
            if not self._inside:
                cut = data.find(b'"', pos)
                if cut < 0:
                    self._out.append(data[pos:])
                    return
                self._out.append(data[pos : cut + 1])
                pos, self._inside, self._length = cut + 1, True, 0
                continue
            stop = self._string_end(data, pos)
            self._keep(data[pos : end if stop < 0 else stop])
            if stop < 0:
                return
            self._out.extend(self._string)
            self._out.append(b'"')
            self._string.clear()
            pos, self._inside = stop + 1, False

    def _string_end(self, data: bytes, pos: int) -> int:
        """Index of the quote that ends the string, or -1; remembers a trailing backslash for the next piece."""
        if self._escaped:
            pos += 1
            self._escaped = False
        while True:
            cut = data.find(b'"', pos)
            before = cut if cut >= 0 else len(data)
            odd = 0
            if before > pos and data[before - 1] == 0x5C:
                odd = (before - pos - len(data[pos:before].rstrip(b"\\"))) & 1
            if cut < 0:
                self._escaped = bool(odd)
                return -1
            if not odd:
                return cut
            pos = cut + 1

    def _keep(self, text: bytes) -> None:
        self._length += len(text)
        if self._length <= _KEEP:
            self._string.append(text)
        else:
            self._string.clear()

    def result(self) -> bytes:
        """The reduced document."""
        return b"".join(self._out)
