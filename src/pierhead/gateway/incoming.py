"""A request body on its way in, by length or in chunks, within its limit; knows no connection."""

from __future__ import annotations

from pierhead.gateway.skeleton import Skeleton
from pierhead.gateway.wire import BadMessage, ChunkedDecoder

_MIN_RATE = 16384  # bytes a second that a body must reach after its first ``body_timeout``


class Incoming:
    """Collects ``pieces`` until ``done``; ``skeleton`` reads along where the model's name is wanted."""

    __slots__ = ("_decoder", "_left", "_limit", "done", "pieces", "size", "skeleton")

    def __init__(self, length: int | None, *, limit: int, max_trailer: int, skeleton: bool) -> None:
        self._decoder = ChunkedDecoder(max_trailer) if length is None else None
        self._left = length or 0
        self._limit = limit
        self.pieces: list[bytes] = []
        self.size = 0
        self.done = False
        self.skeleton = Skeleton() if skeleton else None

    @property
    def allowance(self) -> float:
        """Seconds beyond the timeout that what came so far has earned."""
        return self.size / _MIN_RATE

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to this body and return what follows it; BadMessage 413 beyond the limit."""
        decoder = self._decoder
        if decoder is not None:
            pieces = decoder.feed(data)
            self.done, rest = decoder.done, decoder.rest
        else:
            pieces, rest = [data[: self._left]], data[self._left :]
            self._left -= len(pieces[0])
            self.done = not self._left
        self.size += sum(map(len, pieces))
        if self.size > self._limit:
            raise BadMessage(f"the body is longer than {self._limit} bytes", 413)
        self.pieces += pieces
        if self.skeleton is not None:
            for piece in pieces:
                self.skeleton.feed(piece)
        return rest
