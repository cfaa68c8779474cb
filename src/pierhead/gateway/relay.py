"""One proxied request from its arrival to its last byte: finds an engine, sends, relays, ends well; parses no HTTP."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pierhead.gateway.faults import Fault, from_engine
from pierhead.gateway.metrics import ModelStats
from pierhead.gateway.model_name import INLINE, read_model
from pierhead.gateway.sse import EventSplitter
from pierhead.gateway.tool_choice import MARK, adapt
from pierhead.gateway.upstream import Answer, Target, UpstreamConnection
from pierhead.gateway.usage import tokens

if TYPE_CHECKING:
    from pierhead.gateway.admission import Admitted
    from pierhead.gateway.protocol import ClientConnection
    from pierhead.gateway.services import Services

_ERROR_MAX = 65536
_TAIL = 4096


class Relay:
    """Answers one request for a model, or one for the control API."""

    # Defaults live on the class: a request that takes the usual way sets few of them.
    model = ""
    status = 0
    sent = 0
    _last = 0.0
    _stats: ModelStats | None = None
    _target: Target | None = None
    _conn: UpstreamConnection | None = None
    _task: asyncio.Task[None] | None = None
    _answer: Answer | None = None
    _events: EventSplitter | None = None
    _collected: list[bytes] | None = None
    _tail = b""
    _chunked = False
    _chooses = False
    _pooled = False
    _retried = False
    _revived = False

    def __init__(
        self, services: Services, client: ClientConnection, request: Admitted, body: list[bytes], request_id: bytes
    ) -> None:
        self._services = services
        self._client = client
        self._request = request
        self._body = body
        self.id = request_id
        self.started = time.monotonic()

    @property
    def replica(self) -> str:
        """Which replica answers, for the access log."""
        return self._target.replica if self._target else ""

    # --- finding an engine ----------------------------------------------------------------------------------------

    def start(self, skeleton: bytes | None = None) -> None:
        """Begin; ``skeleton`` stands for a large body where only ``model`` matters."""
        try:
            if self._request.control:
                self._claim(self._services.control())
            else:
                body = self._body
                text = skeleton if skeleton is not None else body[0] if body else b""
                self._chooses = MARK in text
                if len(text) > INLINE:
                    self._spawn(text)
                    return
                self._route(read_model(text))
                if self._chooses and self._target is not None and skeleton is None:
                    self._chooses, self._body = False, [adapt(text, self._target.call_prefix)]
        except Fault as fault:
            self._fail(fault)
            return
        target = self._target
        conn = target.take() if target is not None else None
        if conn is None:
            self._spawn(None)
        else:
            self._pooled = True
            self._send(conn)

    def _route(self, model: str) -> None:
        entry = self._services.routes.find(model)
        self.model = entry.name
        self._stats = self._services.metrics.model(entry.name)
        self._claim(entry.choose())

    def _claim(self, target: Target | None) -> None:
        """Count this request on ``target`` and on no other."""
        if self._target is not None:
            self._target.open -= 1
            self._target.changed = True
        self._target = target
        if target is not None:
            target.open += 1
            target.changed = True

    def _spawn(self, text: bytes | None) -> None:
        self._task = asyncio.get_running_loop().create_task(self._drive(text))
        self._task.add_done_callback(self._driven)

    def _driven(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and task.exception() is not None:  # a bug of ours: say so, leave nobody waiting
            asyncio.get_running_loop().call_exception_handler({"message": "a relay broke", "task": task})
            self._fail(Fault(500, "internal", "the gateway failed on this request; this is a bug."))

    async def _drive(self, text: bytes | None) -> None:
        """The slow ways: decode off the loop, start the model, open a connection."""
        try:
            if text is not None:
                self._route(await asyncio.to_thread(read_model, text))
            if self._chooses:
                await self._adapt()
            conn = await self._connection()
        except Fault as fault:
            self._fail(fault)
            return
        self._pooled = False
        self._send(conn)

    async def _adapt(self) -> None:
        target = await self._ready()
        self._body = [await asyncio.to_thread(adapt, b"".join(self._body), target.call_prefix)]
        self._chooses = False

    async def _ready(self) -> Target:
        if self._target is None:
            self._claim(await self._services.ensure_ready(self.model, ""))
        assert self._target is not None
        return self._target

    async def _connection(self) -> UpstreamConnection:
        while True:
            target = await self._ready()
            try:
                return await target.connect()
            except BlockingIOError as exc:
                raise Fault(503, "engine_busy", "the engine accepts no more connections now.", source="engine") from exc
            except OSError as exc:
                if self._request.control:
                    raise self._services.no_daemon() from exc
                if self._revived:
                    raise Fault(502, "engine_failed", "the engine does not listen.", source="engine") from exc
            self._revived = True
            self._claim(await self._services.ensure_ready(self.model, target.replica))

    def _send(self, conn: UpstreamConnection) -> None:
        self._conn = conn
        request = self._request
        body = self._body
        size = len(body[0]) if len(body) == 1 else sum(map(len, body))
        framing = b"content-length: %d\r\n" % size if size or request.sends_body else b""
        head = b"%bx-request-id: %b\r\n%b\r\n" % (request.forward, self.id, framing)
        conn.begin(self, head, body or (b"",), request.method == "HEAD")
        if self._client.writing_paused:
            conn.pause()

    # --- the answer (Receiver) ------------------------------------------------------------------------------------

    def on_whole(self, answer: Answer, body: bytes) -> None:
        self._conn = None
        status = answer.head.status
        if status >= 400 and not self._request.control:
            self._normalized(status, body)
            return
        self.status = status
        bodiless = status in (204, 304)
        if self._request.method == "HEAD":
            length = answer.head.length
            framing = b"" if bodiless or length is None else b"content-length: %d\r\n" % length
        else:
            framing = b"" if bodiless else b"content-length: %d\r\n" % len(body)
        head = b"%b%bx-request-id: %b\r\n%b\r\n" % (answer.prefix, framing, self.id, self._client.connection_line())
        self.sent = len(body)
        self._client.write(head + body)
        if self._stats is not None:
            self._count(body[-_TAIL:])
        self._done(True)

    def on_head(self, answer: Answer) -> None:
        self._answer = answer
        self._body = []
        status = answer.head.status
        if status >= 400 and not self._request.control:
            self._collected = []
            return
        self.status = status
        if answer.sse and self._stats is not None:
            self._events = EventSplitter()
        if answer.head.length is not None:
            framing = b"content-length: %d\r\n" % answer.head.length
        elif self._request.http10:
            framing = b""
            self._client.close_after()
        else:
            self._chunked = True
            framing = b"transfer-encoding: chunked\r\n"
        self._client.write(
            b"%b%bx-request-id: %b\r\n%b\r\n" % (answer.prefix, framing, self.id, self._client.connection_line())
        )

    def on_piece(self, piece: bytes) -> None:
        if self._events is not None:
            piece = self._events.feed(piece)
            if not piece:
                return
            self._observe(piece)
        elif self._collected is not None:
            if sum(map(len, self._collected)) < _ERROR_MAX:
                self._collected.append(piece[:_ERROR_MAX])
            return
        self._deliver(piece)

    def on_end(self) -> None:
        self._conn = None
        if self._collected is not None:
            assert self._answer is not None
            self._normalized(self._answer.head.status, b"".join(self._collected))
            return
        events, answer = self._events, self._answer
        if events is not None:
            framed = answer is not None and (answer.head.chunked or answer.head.length is not None)
            if not framed and not events.done:
                self._broken("the engine's stream ended without its [DONE]")
                return
            held = events.flush()
            if held:
                self._deliver(held)
        if self._chunked:
            self._client.write(b"0\r\n\r\n")
        if self._stats is not None:
            self._count(self._tail)
        self._done(True)

    def on_lost(self, reason: str, pristine: bool) -> None:
        self._conn = None
        if pristine and self._pooled and not self._retried:
            self._retried = True
            if self._stats is not None:
                self._stats.retries += 1
            self._spawn(None)
        elif self.status:
            self._broken(reason)
        else:
            self._fail(Fault(502, "engine_failed", f"{reason}.", source="engine"))

    def _deliver(self, piece: bytes) -> None:
        self.sent += len(piece)
        self._client.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)

    def _observe(self, piece: bytes) -> None:
        stats = self._stats
        assert stats is not None
        now = time.monotonic()
        if self._last:
            count = piece.count(b"\n\n") or 1
            stats.gap.observe((now - self._last) / count, count)
        else:
            stats.ttft.observe(now - self.started)
        self._last = now
        self._tail = piece if len(piece) > 512 else (self._tail + piece)[-_TAIL:]

    # --- endings --------------------------------------------------------------------------------------------------

    def _count(self, tail: bytes) -> None:
        target, stats = self._target, self._stats
        prompt, completion = tokens(tail)
        if target is not None and stats is not None:
            target.prompt_tokens += prompt
            target.completion_tokens += completion
            stats.prompt_tokens += prompt
            stats.completion_tokens += completion

    def _normalized(self, status: int, body: bytes) -> None:
        self._fail(from_engine(status, body))

    def _fail(self, fault: Fault) -> None:
        """Nothing was sent to the client yet: it gets the envelope."""
        self.status = fault.status
        self._client.send_fault(fault, self.id)
        self._done(fault.status < 500)

    def _broken(self, reason: str) -> None:
        """Part of the answer is out: an event stream gets a last event that says so, anything else is cut off."""
        if self._events is not None and self._answer is not None and not self._events.ragged:
            fault = Fault(502, "engine_failed", f"{reason}.", source="engine")
            if self._answer.head.length is None:
                self._client.close_after()
                self._deliver(fault.event())
                if self._chunked:
                    self._client.write(b"0\r\n\r\n")
                self._done(False)
                return
        self._settle(False)
        self._client.abort()

    def _done(self, ok: bool) -> None:
        self._settle(ok)
        self._client.relay_done()

    def _settle(self, ok: bool) -> None:
        self._body = []
        stats, target = self._stats, self._target
        if stats is not None:
            if ok or self.status >= 400:
                stats.finished(self.status, time.monotonic() - self.started)
            else:
                stats.aborted += 1
        if target is not None:
            target.open -= 1
            target.changed = True
            target.last_used = time.time()
            if ok:
                target.finished += 1
            else:
                target.failed += 1
            if not target.open:
                self._services.replica_idle()
        self._services.log(self._client, self._request, self)

    # --- the client -----------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """The client went away: stop the work."""
        if self._task is not None:
            self._task.cancel()
        if self._conn is not None:
            self._conn.close()
            self._conn = None
        if not self.status:
            self.status = 499
        self._settle(False)

    def expire(self, fault: Fault) -> None:
        """The request took too long."""
        if self._task is not None:
            self._task.cancel()
        if self._conn is not None:
            self._conn.close()
            self._conn = None
        if self.status:
            self._broken("the answer took too long")
        else:
            self._fail(fault)

    def pause(self) -> None:
        """The client reads slowly."""
        if self._conn is not None:
            self._conn.pause()

    def resume(self) -> None:
        """The client caught up."""
        if self._conn is not None:
            self._conn.resume()
