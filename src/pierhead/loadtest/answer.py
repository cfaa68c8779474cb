"""One answer as it arrives: the time of each piece, its tokens, and what went wrong; opens no connection."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from time import perf_counter

import msgspec

MAX_LINE = 4 << 20
MAX_BODY = 64 << 20
_NULL = msgspec.Raw(b"null")


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = _NULL


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str = ""


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = _NULL


class _Whole(msgspec.Struct):
    usage: _Usage | None = None


_event = msgspec.json.Decoder(_Event)
_whole = msgspec.json.Decoder(_Whole)


@dataclass
class Answer:
    """What came, fed by ``head``, ``piece`` and ``end``; times are of ``time.perf_counter``.

    ``error`` is "" or a kind: ``connect``, ``timeout``, ``broken_off``, ``http_503``, ``stream_error``,
    ``not_understood``; ``reason`` is the server's own words about it.
    """

    streamed: bool
    intended: float
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    ended: float = 0.0
    status: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    pieces: int = 0
    error: str = ""
    reason: str = ""
    gaps: array[float] = field(default_factory=lambda: array("d"))
    _sse: bool = False
    _done: bool = False
    _rest: bytes = b""
    _size: int = 0

    @property
    def finished(self) -> bool:
        """Whether a stream said that it was all."""
        return self._done

    @property
    def sse(self) -> bool:
        """Whether it is a stream of events."""
        return self._sse

    def forget(self) -> None:
        """Keep the figures only."""
        self._rest = b""

    @property
    def body(self) -> bytes:
        """An answer in one piece, or the words of a refusal."""
        return self._rest

    def head(self, status: int, content_type: bytes) -> None:
        """Status and type are known."""
        self.status = status
        self._sse = self.streamed and status == 200 and content_type.startswith(b"text/event-stream")

    def piece(self, data: bytes, now: float) -> None:
        """Bytes of the body."""
        if self.error:
            return
        data = self._rest + data if self._rest else data
        if not self._sse:
            self._rest = data
            if len(data) > MAX_BODY:
                self.fail("not_understood", "the answer is too large")
            return
        *lines, self._rest = data.split(b"\n")
        if len(self._rest) > MAX_LINE:
            self.fail("not_understood", "a line without end")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(line[5:].strip(), now)

    def end(self, now: float) -> None:
        """The body is whole."""
        self.ended = now
        if self.error:
            return
        if self.status != 200:
            self.fail(f"http_{self.status}", _said(self._rest))
        elif self._sse:
            if not self._done and not self.pieces:
                self.fail("broken_off", "the stream ended before it began")
        else:
            self._on_whole(now)
        self.output_tokens = self.output_tokens or self.pieces

    def fail(self, kind: str, reason: str = "") -> None:
        """It went wrong; the first reason counts."""
        if not self.error:
            self.error, self.reason = kind, reason[:300]
            self.ended = self.ended or perf_counter()

    def _on_event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        try:
            event = _event.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            return self.fail("not_understood", str(exc))
        if event.error != _NULL:
            return self.fail("stream_error", _said(data))
        if event.usage is not None:
            self._count(event.usage)
        if event.choices and _tells(event.choices[0]):
            if self.first:
                self.gaps.append(now - self.last)
            else:
                self.first = now
            self.last = now
            self.pieces += 1

    def _on_whole(self, now: float) -> None:
        """An answer in one piece: embeddings, or a server that does not stream."""
        try:
            found = _whole.decode(self._rest)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            return self.fail("not_understood", str(exc))
        self.first = self.last = now
        if found.usage is not None:
            self._count(found.usage)

    def _count(self, usage: _Usage) -> None:
        self.prompt_tokens = max(0, usage.prompt_tokens or usage.total_tokens - usage.completion_tokens)
        self.output_tokens = max(0, usage.completion_tokens)


def _tells(choice: _Choice) -> bool:
    """Whether an event brings text, thought or a tool call, and not a role or an end alone."""
    delta = choice.delta
    if delta is None:
        return bool(choice.text)
    return bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls != _NULL)


class _Said(msgspec.Struct):
    message: str = ""


class _Envelope(msgspec.Struct):
    error: _Said | str | None = None
    message: str = ""
    detail: msgspec.Raw = _NULL


def _said(data: bytes) -> str:
    """A server's own words about a failure."""
    try:
        found = msgspec.json.decode(data, type=_Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return data[:300].decode("utf-8", "replace").strip()
    error = found.error
    text = error.message if isinstance(error, _Said) else error or found.message
    return text or (bytes(found.detail).decode("utf-8", "replace") if found.detail != _NULL else "")
