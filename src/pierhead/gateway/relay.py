"""One proxied request until an engine has it: decoded, admitted, routed, made for its engine, sent; parses no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any
from urllib.parse import unquote

from pierhead.gateway import forms, outgoing, peer, translate
from pierhead.gateway.ask import Ask, form_ask, read_ask
from pierhead.gateway.dialects.base import Reply
from pierhead.gateway.faults import Fault, engine_failed
from pierhead.gateway.hedge import Hedged
from pierhead.gateway.holder import Hold
from pierhead.gateway.outgoing import Given, Outgoing
from pierhead.gateway.skeleton import INLINE
from pierhead.gateway.upstream import Receiver, Target, UpstreamConnection


class Relay(Hedged):
    """Answers one request for a model, or one for the control API."""

    # --- beginning ------------------------------------------------------------------------------------------------

    def start(self, skeleton: bytes | None = None) -> None:
        """Begin; ``skeleton`` stands for a large body where only short members matter."""
        request, body = self._request, self._body
        text = skeleton if skeleton is not None else body[0] if body else b""
        self._skeleton = skeleton
        try:
            if request.control:
                self._outgoing = Outgoing(request.forward, body)
                self._claim(self._services.control())
                if request.own:
                    self._spawn(self._drive())
                    return
            elif len(text) > INLINE or request.named or not request.reads_json:
                self._spawn(self._drive(text))
                return
            elif not self._admit(read_ask(text, request.asks)):
                self._spawn(self._drive())
                return
        except Fault as fault:
            self._fail(fault)
            return
        assert self._target is not None
        conn = self._target.take()
        if conn is None:
            self._spawn(self._drive())
        else:
            self._pooled = True
            self._send(conn)

    def _admit(self, ask: Ask) -> bool:
        """Route the request; whether it can be sent at once. Fault when it may not, or cannot, be served."""
        request, operation = self._request, self._request.operation
        assert operation is not None
        assert ask.model is not None
        self._ask = ask
        self._entry = entry = self._services.routes.find(ask.model)
        self._stats = self._services.metrics.model(entry.name)
        holder = request.holder
        if holder is not None:
            holder.allow(operation, entry.name, entry.aliases)
        if entry.plan is not None:
            entry = self._decided(entry, ask)
        if holder is not None:
            hold = holder.begin(ask, entry, self._size, operation, self._text)
            if hold is None:
                return False
            self._granted(hold)
        target = self._place(ask)
        if target is None:
            return False
        self._claim(target)
        outgoing.check(ask, target, entry)
        if self._skeleton is None:
            self._outgoing = outgoing.native(request, ask, self._body, target, self._cap)
        return self._outgoing is not None

    @property
    def _cap(self) -> int:
        return self._hold.cap if self._hold is not None else 0

    # --- the slow ways --------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._driven)

    def _driven(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
        if not task.cancelled() and task.exception() is not None:  # a bug of ours: say so, leave nobody waiting
            asyncio.get_running_loop().call_exception_handler({"message": "a relay broke", "task": task})
            self._fail(Fault(500, "internal", "the gateway failed on this request; this is a bug."))

    def _again(self) -> None:
        self._spawn(self._drive())

    async def _drive(self, text: bytes | None = None) -> None:
        """Decode off the loop, lease, start the model, translate, open a connection: whatever is not done yet."""
        try:
            if self._request.own:
                await asyncio.to_thread(peer.may_change, *self._client.ends)
            if text is not None:
                self._admit(await asyncio.to_thread(self._read, text))
            await self._admitted()
            if await self._early():
                return
            conn = await self._connection()
            if conn is None:
                return
        except Fault as fault:
            self._fail(fault)
            return
        self._send(conn)

    def _read(self, text: bytes) -> Ask:
        """What the body, the form or the path says."""
        request = self._request
        if request.named:
            return Ask(model=self._services.routes.owner(unquote(request.named)))
        if not request.reads_json:
            return form_ask(forms.fields(text, translate.headers(request.forward).get("content-type", "")))
        return read_ask(text, request.asks)

    def _granted(self, hold: Hold) -> None:
        self._hold = hold
        self._services.metrics.holds += 1
        self._client.extra = hold.headers

    async def _admitted(self) -> None:
        holder, ask, entry, operation = self._request.holder, self._ask, self._entry, self._request.operation
        if holder is not None and self._hold is None and operation is not None:
            assert ask is not None
            assert entry is not None
            self._granted(await holder.wait(ask, entry, self._size, operation, self._text))

    def _given(self) -> Given:
        ask, entry = self._ask, self._entry
        assert ask is not None
        assert entry is not None
        if self._calls is None:
            self._calls = []
        return Given(
            self._request, ask, entry, self._body, self._skeleton, self.id, self._cap, self.started, self._calls
        )

    async def _early(self) -> bool:
        """Whether the client has its answer already, without an engine."""
        operation = self._request.operation
        if operation is None or self._outgoing is not None or not translate.may_be_early(operation.name, self._body):
            return False
        reply = await outgoing.early(self._services, self._given())
        if reply is not None:
            self._reply(reply)
        return reply is not None

    async def _ready(self) -> Target:
        if self._target is None:
            self._claim(await self._find_place())
        assert self._target is not None
        return self._target

    async def _connection(self) -> UpstreamConnection | None:
        """A connection to an engine that what it gets is made for; None when the answer needed none."""
        while True:
            target = await self._ready()
            try:
                if self._outgoing is None and not await self._prepare(target):
                    return None
                idle = target.take() if not self._retried else None
                self._pooled = idle is not None
                return idle or await target.connect()
            except BlockingIOError as exc:
                raise Fault(503, "engine_busy", "the engine accepts no more connections now.", source="engine") from exc
            except OSError as exc:
                if self._request.control:
                    raise self._services.no_daemon() from exc
                if self._switch():
                    continue
                if self._revived:
                    self._faulty = True
                    raise engine_failed("the engine does not listen") from exc
            self._revived = True
            assert self._entry is not None
            self._move(await self._services.ensure_ready(self._entry.name, target.replica))
            self._outgoing = None

    async def _prepare(self, target: Target) -> bool:
        """Make what ``target`` gets; False when the client has its answer already."""
        made = await self._make(target)
        if isinstance(made, Reply):
            self._reply(made)
            return False
        self._outgoing = made
        if made.note and made.note not in self._extra:
            self._extra += made.note
        return True

    def _send(self, conn: UpstreamConnection) -> None:
        self._conn = conn
        self._asked = True
        made = self._outgoing
        assert made is not None
        if self._copy:
            self._mirror(self._given())
        self._begin(conn, made, self if self._ticket is None else self._receiver(conn))

    async def _make(self, target: Target) -> Outgoing | Reply:
        return await outgoing.make(self._services, self._given(), target)

    def _begin(self, conn: UpstreamConnection, made: Outgoing, receiver: Receiver) -> None:
        request, body = self._request, made.body
        size = len(body[0]) if len(body) == 1 else sum(map(len, body))
        framing = b"content-length: %d\r\n" % size if size or request.sends_body else b""
        head = b"%bx-request-id: %b\r\n%b%b\r\n" % (made.head, self.id, self._traced(), framing)
        conn.begin(receiver, head, body or (b"",), request.method == "HEAD")
        if self._client.writing_paused:
            conn.pause()
