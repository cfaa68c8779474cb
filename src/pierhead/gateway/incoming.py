"""A request body on its way in, by length or in chunks, within its limit; knows no connection."""

from __future__ import annotations

from pierhead.gateway.skeleton import Skeleton
from pierhead.gateway.wire import BadMessage, ChunkedDecoder

_MIN_RATE = 16384  # bytes a second that a body must reach after its first ``body_timeout``


_LINES = 1024  # chunk lines read before others get a turn: about a millisecond
_SMALL = 4096
_JOINED = 65536


class Incoming:
    """Collects ``pieces`` until ``done``; ``skeleton`` reads along where the model's name is wanted.

    Small pieces are joined, so that a body which comes in single bytes takes no more memory than another.
    """

    __slots__ = ("_decoder", "_left", "_limit", "_loose", "done", "paused", "pieces", "size", "skeleton")

    def __init__(self, length: int | None, *, limit: int, max_trailer: int, skeleton: bool) -> None:
        self._decoder = ChunkedDecoder(max_trailer, _LINES) if length is None else None
        self._left = length or 0
        self._limit = limit
        self._loose = bytearray()
        self.pieces: list[bytes] = []
        self.size = 0
        self.done = False
        self.paused = False
        self.skeleton = Skeleton() if skeleton else None

    @property
    def allowance(self) -> float:
        """Seconds beyond the timeout that what came so far has earned."""
        return self.size / _MIN_RATE

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to this body and return what follows it; BadMessage 413 beyond the limit.

        When ``paused`` is set after it, the rest is of this body still, and others should have a turn first.
        """
        decoder = self._decoder
        if decoder is not None:
            pieces = decoder.feed(data)
            self.done, self.paused, rest = decoder.done, decoder.paused, decoder.rest
        else:
            pieces, rest = [data[: self._left]], data[self._left :]
            self._left -= len(pieces[0])
            self.done = not self._left
        self.size += sum(map(len, pieces))
        if self.size > self._limit:
            raise BadMessage(f"the body is longer than {self._limit} bytes", 413)
        self._collect(pieces)
        if self.skeleton is not None and pieces:
            self.skeleton.feed(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        return rest

    def _collect(self, pieces: list[bytes]) -> None:
        loose = self._loose
        for piece in pieces:
            if len(piece) < _SMALL:
                loose += piece
            if loose and (len(piece) >= _SMALL or len(loose) >= _JOINED):
                self.pieces.append(bytes(loose))
                loose.clear()
            if len(piece) >= _SMALL:
                self.pieces.append(piece)
        if self.done and loose:
            self.pieces.append(bytes(loose))
            loose.clear()
