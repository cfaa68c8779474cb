"""The answer of one request on its way to the client, from its head to its last byte; asks no engine.

What became of the request is booked before its last byte leaves, so that nobody has an answer that was not counted.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from pierhead.gateway.dialects.base import SSE, Translation
from pierhead.gateway.faults import Fault, engine_failed, from_engine
from pierhead.gateway.passthrough import BARE, completed
from pierhead.gateway.stream import Stream
from pierhead.gateway.translated import Translated
from pierhead.gateway.upstream import Answer, UpstreamConnection
from pierhead.gateway.usage import of_whole

if TYPE_CHECKING:
    from pierhead.gateway.link import Trouble

_ERROR_MAX: Final = 65536
_TAIL: Final = 4096


class Delivery(Translated):
    """A ``Receiver`` of an engine's answer and the ``Work`` of a client's connection, where it is about the answer."""

    # Defaults live on the class: a request that takes the usual way sets few of them.
    early = False  # a head went out while the request waited, and comments since
    _faulty = False  # it failed by the replica's fault
    _extra: bytes = b""  # headers of ours
    _then: tuple[str, ...] = ()  # who may be asked after this one
    _held = False  # the head waits for the first bytes
    _trouble: Trouble | None = None
    _conn: UpstreamConnection | None = None
    _task: asyncio.Task[None] | None = None
    _answer: Answer | None = None
    _collected: list[bytes] | None = None
    _skeleton: bytes | None = None
    _chunked = False
    _measured = False  # whether the client was told the length of the answer
    _pooled = False
    _revived = False

    # --- the answer (Receiver) ------------------------------------------------------------------------------------

    def on_whole(self, answer: Answer, body: bytes) -> None:
        self._conn = None
        status, made = answer.head.status, self._outgoing
        if status >= 400 and not self._request.control:
            if not self._elsewhere(status):
                self._faulty = status >= 500
                self._fail(self._refusal(answer, body))
            return
        assert made is not None
        if answer.sse and (made.translation is not None or made.strip or self.early):
            self.on_head(answer)
            self.on_piece(body)
            if self._answer is not None:  # else it is another's turn, or the client was told why not
                self.on_end()
            return
        self.status = status
        if self._stats is not None:
            self._tail = body[-_TAIL:]
            self.usage = of_whole(body)
        if made.translation is not None:
            self._translated(made.translation, body)
            return
        if self._request.method == "HEAD" or status in (204, 304):
            self._bodiless(answer)
            return
        self._whole(answer.prefix, completed(body) if body.startswith(BARE) else body)

    def _refusal(self, answer: Answer, body: bytes) -> Fault:
        """An engine's or a provider's error in the one envelope."""
        outside = self._target.outside if self._target is not None else None
        status = answer.head.status
        return from_engine(status, body) if outside is None else outside.fault(status, body, answer.head)

    def _whole(self, prefix: bytes, body: bytes) -> None:
        """A whole answer; what is recorded of it is recorded before its last byte leaves."""
        if self.early:
            self._fail(engine_failed("the engine did not stream its answer"))
            return
        self.sent = len(body)
        line = self._extra + self._client.connection_line()
        self._settle(True)
        self._client.write(
            b"%bcontent-length: %d\r\nx-request-id: %b\r\n%b\r\n%b" % (prefix, len(body), self.id, line, body)
        )
        self._client.relay_done()

    def _bodiless(self, answer: Answer) -> None:
        length = answer.head.length
        if self._request.method != "HEAD" or answer.head.status in (204, 304):
            length = None
        framing = b"content-length: %d\r\n" % length if length is not None else b""
        line = self._client.connection_line()
        self._settle(True)
        self._client.write(b"%b%bx-request-id: %b\r\n%b\r\n" % (answer.prefix, framing, self.id, line))
        self._client.relay_done()

    def on_head(self, answer: Answer) -> None:
        self._answer = answer
        made, status = self._outgoing, answer.head.status
        assert made is not None
        translation = made.translation
        if status < 500 and not self._then:  # else another replica, or a fallback, may be asked yet
            self._body = []
            made.body = []
        if (status >= 400 and not self._request.control) or (translation is not None and not answer.sse):
            self._collected = []
            return
        if self.early and not answer.sse:  # the client was promised events
            self._drop()
            self._answer = None
            self._fail(engine_failed("the engine did not stream its answer"))
            return
        self.status = status
        sse = answer.sse and self._stats is not None
        self._stream = Stream(self._stats, self.started, sse=sse, strip=made.strip, translation=translation)
        self._stream.begun = self._begun
        self._open(answer, translation, sse and made.strip)

    def _open(self, answer: Answer, translation: Translation | None, strips: bool) -> None:
        """The client's head, unless it has one."""
        if self.early:
            return
        framing = b""
        prefix = answer.prefix
        if translation is not None:
            prefix = self._prefix(200, translation.kind) + b"cache-control: no-cache\r\n"
        if answer.head.length is not None and translation is None and not strips:
            framing = b"content-length: %d\r\n" % answer.head.length
            self._measured = True
        elif self._request.http10:
            self._client.close_after()
        else:
            self._chunked = True
            framing = b"transfer-encoding: chunked\r\n"
        line = self._extra + self._client.connection_line()
        self._client.write(b"%b%bx-request-id: %b\r\n%b\r\n" % (prefix, framing, self.id, line))

    def on_piece(self, piece: bytes) -> None:
        stream = self._stream
        if stream is None:
            self._collect(piece)
            return
        try:
            piece = stream.feed(piece)
        except Fault as fault:
            self._drop()
            self._fail(fault)
            self._answer = None
            return
        if piece:
            self._deliver(piece)

    def _collect(self, piece: bytes) -> None:
        """An answer that must be whole before the client gets it: an error, or one to translate."""
        collected = self._collected
        assert collected is not None
        assert self._answer is not None
        failed = self._answer.head.status >= 400
        size = sum(map(len, collected)) + len(piece)
        if not failed and size > self._services.settings.max_body:
            self._drop()
            self._fail(Fault(502, "answer_too_large", "the engine's answer is too long.", source="engine"))
        elif not failed or size < _ERROR_MAX:
            collected.append(piece)

    def on_end(self) -> None:
        self._conn = None
        answer, stream = self._answer, self._stream
        assert answer is not None
        if self._collected is not None:
            body, self._collected = b"".join(self._collected), None
            self.on_whole(answer, body)
            return
        assert stream is not None
        framed = answer.head.chunked or answer.head.length is not None
        try:
            rest = stream.finish(framed)
        except Fault as fault:
            self._fail(fault)
            return
        if rest is None:
            self._fail(engine_failed("the engine's stream ended without its [DONE]"))
            return
        if self._held and not self._unheld(rest):
            return
        self.usage = stream.usage
        made = self._outgoing
        if made is not None and made.translation is not None:
            self._when_kept(made.translation, lambda: self._finish(rest), self._broken)
        else:
            self._finish(rest)

    def _finish(self, rest: bytes) -> None:
        """The last bytes of a stream."""
        self.sent += len(rest)
        self._settle(True)
        if rest:
            self._client.write(b"%x\r\n%b\r\n" % (len(rest), rest) if self._chunked else rest)
        if self._chunked:
            self._client.write(b"0\r\n\r\n")
        self._client.relay_done()

    def on_lost(self, reason: str, pristine: bool) -> None:
        self._conn = None
        if pristine and self._pooled and not self._retried:
            self._retried = True
            if self._stats is not None:
                self._stats.retries += 1
            self._again()
        elif self._stream is not None or not self._elsewhere():
            self._faulty = True
            local = self._target is not None and self._target.outside is None
            self._fail(engine_failed(reason, self._entry.name if local and self._entry is not None else ""))

    def _again(self) -> None:
        """Send the request once more: the connection it was sent on had gone stale, or another replica takes it."""
        raise NotImplementedError

    def _elsewhere(self, status: int = 502) -> bool:
        """Whether another replica is asked now, because of what this one answered."""
        raise NotImplementedError

    def _begun(self) -> None:
        """The first event of the answer is here."""

    def _unheld(self, piece: bytes) -> bool:
        """Send the head that was held back for ``piece``; False when that tells of a failure."""
        raise NotImplementedError

    def _deliver(self, piece: bytes) -> None:
        if self._held and not self._unheld(piece):
            return
        self.sent += len(piece)
        self._client.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)

    # --- endings --------------------------------------------------------------------------------------------------

    def _fail(self, fault: Fault) -> None:
        """Tell the client: by the envelope, unless a head has been sent already."""
        if self._booked:  # a bug after the end: nobody knows what the client has, and another's answer may be under way
            self._client.abort()
            return
        if self.early or self._stream is not None:
            self._broken(fault)
            return
        self.status = fault.status
        self.code = fault.code
        self._settle(fault.status < 500)
        self._client.send_fault(fault, self.id)
        self._client.relay_done()

    def _broken(self, fault: Fault) -> None:
        """Part of the answer is out: an event stream gets a last event that says so, anything else is cut off."""
        self.code = fault.code
        self._drop()
        stream = self._stream
        if stream is not None:
            self.usage = stream.usage
        if stream is None and self.early:
            self.status = fault.status
        can_say = stream.can_say_why if stream is not None else self.early
        if can_say and (self._chunked or (self._client.closes and not self._measured)):
            self._settle(False)
            self._client.close_after()
            told = stream.failure(fault) if stream is not None else b""
            self._deliver(told or fault.event(self._request.dialect, self.id))
            if self._chunked:
                self._client.write(b"0\r\n\r\n")
            self._client.relay_done()
            return
        self._settle(False)
        self._client.abort()

    def _drop(self) -> None:
        """Let go of the engine's connection and of what is under way."""
        if self._task is not None:
            self._task.cancel()
        if self._conn is not None:
            self._conn.close()
            self._conn = None

    # --- the client -----------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """The client went away: stop the work."""
        self._drop()
        if self._stream is not None:
            self.usage = self._stream.usage
        if not self.status or (self.early and self._stream is None):
            self.status = 499
        self._settle(False)

    def expire(self, fault: Fault) -> None:
        """The request took too long."""
        self._drop()
        self._fail(fault)

    def probe(self) -> None:
        """Send what a client ignores that reads server-sent events, and that one which is gone answers with a reset."""
        stream, made = self._stream, self._outgoing
        translation = made.translation if made is not None else None
        if (
            self._chunked
            and stream is not None
            and stream.can_say_why
            and (translation is None or translation.kind == SSE)
        ):
            self._deliver(b":\n\n")

    def pause(self) -> None:
        """The client reads slowly."""
        if self._conn is not None:
            self._conn.pause()

    def resume(self) -> None:
        """The client caught up."""
        if self._conn is not None:
            self._conn.resume()
