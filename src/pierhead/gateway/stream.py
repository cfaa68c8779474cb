"""A streamed answer on its way through: cut at events, its usage read, translated where need be; sends nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from pierhead.gateway.dialects.base import Failing, Translation
from pierhead.gateway.faults import Fault
from pierhead.gateway.metrics import ModelStats
from pierhead.gateway.sse import EventSplitter
from pierhead.gateway.usage import NOTHING, Usage, merged, tokens

_TAIL: Final = 4096
_NO_CHOICE: Final = b'"choices":[]'
_NO_CHOICE_SPACED: Final = b'"choices": []'
_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")  # of an event


class Stream:
    """Takes the engine's bytes and gives the client's; ``first`` is when the first event came (monotonic, 0: none).

    ``strip`` takes out the event that tells the usage, which the client did not ask for. An answer that is no event
    stream passes as it is.
    """

    __slots__ = (
        "_began",
        "_events",
        "_last",
        "_started",
        "_stats",
        "_strip",
        "_tail",
        "_translation",
        "begun",
        "first",
    )

    def __init__(
        self, stats: ModelStats | None, started: float, *, sse: bool, strip: bool, translation: Translation | None
    ) -> None:
        self._stats = stats
        self._started = started
        self._events = EventSplitter() if sse else None
        self._strip = strip
        self._translation = translation
        self._last = 0.0
        self._tail = b""
        self._began = NOTHING  # what the first event told: Anthropic's streams tell the prompt there
        self.first = 0.0
        self.begun: Callable[[], None] | None = None  # called at the first event

    @property
    def can_say_why(self) -> bool:
        """Whether the client can be told of a failure by one more event."""
        return self._events is not None and not self._events.ragged

    def feed(self, piece: bytes) -> bytes:
        """What the client gets for this piece; b"" when nothing is due yet."""
        events = self._events
        if events is None:
            if self._stats is not None:
                if not self._tail:
                    self._began = tokens(piece[:_TAIL])  # lists of vectors or ranks come behind it
                self._tail = piece if len(piece) > _TAIL else (self._tail + piece)[-_TAIL:]
            return piece
        piece = events.feed(piece)
        return self._pass(piece) if piece else b""

    def _pass(self, piece: bytes) -> bytes:
        if self._stats is not None:
            self._observe(piece)
        if self._translation is not None:
            return self._translation.events(piece)
        if self._strip and (_NO_CHOICE in piece or _NO_CHOICE_SPACED in piece):
            return _without_usage(piece)
        return piece

    def _observe(self, piece: bytes) -> None:
        stats = self._stats
        assert stats is not None
        now = time.monotonic()
        if self._last:
            count = piece.count(b"\n\n") or 1
            stats.gap.observe((now - self._last) / count, count)
        else:
            self.first = now
            if b'"message_start"' in piece:
                self._began = tokens(piece.partition(b"\n\n")[0])
            stats.ttft.observe(now - self._started)
            if self.begun is not None:
                self.begun()
        self._last = now
        self._tail = piece if len(piece) > 512 else (self._tail + piece)[-_TAIL:]

    def finish(self, framed: bool) -> bytes | None:
        """The last bytes; None when the engine's stream cannot have been whole (``framed``: its length was told)."""
        events = self._events
        rest = b""
        if events is not None:
            if not framed and not events.done:
                return None
            held = events.flush()
            rest = self._pass(held) if held else b""
        if self._translation is not None:
            rest += self._translation.end(self.usage)
        return rest

    def failure(self, fault: Fault) -> bytes:
        """The event by which this stream's own dialect tells of a failure; b"" where it has none of its own."""
        return self._translation.failed(fault) if isinstance(self._translation, Failing) else b""

    @property
    def tail(self) -> bytes:
        """The last of what the engine sent."""
        return self._tail

    @property
    def usage(self) -> Usage:
        """What the engine said that it used, as far as it came."""
        usage = tokens(self._tail) if self._tail else NOTHING
        return merged(self._began, usage) if self._began.known else usage


def _without_usage(piece: bytes) -> bytes:
    """``piece`` without events that carry nothing but the usage."""
    for end in _ENDS:  # an engine ends all its lines alike
        if end in piece:
            return end.join(e for e in piece.split(end) if not _only_usage(e))
    return b"" if _only_usage(piece) else piece


def _only_usage(event: bytes) -> bool:
    chooses = _NO_CHOICE not in event and _NO_CHOICE_SPACED not in event
    return not chooses and (b'"usage":{' in event or b'"usage": {' in event)
