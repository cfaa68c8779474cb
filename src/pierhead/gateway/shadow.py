"""The copy of a request for a shadow: sent when a slot is free, its answer counted and thrown away; delays nobody."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pierhead.gateway import outgoing
from pierhead.gateway.dialects.base import Reply
from pierhead.gateway.faults import Fault
from pierhead.gateway.usage import NOTHING, Usage, tokens

if TYPE_CHECKING:
    from pierhead.gateway.outgoing import Given
    from pierhead.gateway.plans import Budget
    from pierhead.gateway.services import Services
    from pierhead.gateway.upstream import Answer, Target

LARGEST = 1 << 20  # bytes of a request that is copied
_TAIL = 4096


class _Counted:
    """Receives an answer of which only the end is kept, for its usage."""

    def __init__(self) -> None:
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.tail = b""
        self._ok = False

    def on_whole(self, answer: Answer, body: bytes) -> None:
        self.on_head(answer)
        self.tail = body[-_TAIL:]
        self.on_end()

    def on_head(self, answer: Answer) -> None:
        self._ok = answer.head.status < 400

    def on_piece(self, piece: bytes) -> None:
        self.tail = (self.tail + piece)[-_TAIL:]

    def on_end(self) -> None:
        if not self.done.done():
            self.done.set_result(self._ok)

    def on_lost(self, reason: str, pristine: bool) -> None:
        if not self.done.done():
            self.done.set_result(False)


async def send(services: Services, given: Given, budget: Budget, estimate: int) -> None:
    """Send ``given`` to its entry; what came of it goes to ``budget``."""
    usage: Usage | None = None
    try:
        async with asyncio.timeout(services.settings.request_timeout):
            usage = await _sent(services, given)
    except (Fault, OSError):  # of a timeout, too: a shadow that fails is counted, nothing more
        pass
    finally:
        budget.end(estimate, usage)


async def _sent(services: Services, given: Given) -> Usage | None:
    entry, operation = given.entry, given.request.operation
    lane = entry.lane
    if not lane.targets:
        lane.adopt(await services.ensure_ready(entry.name, ""))
    slot = operation is not None and operation.generates
    target = lane.spare() if slot else lane.lend()
    if target is None:
        raise Fault(429, "busy", "no slot is free.")
    target.open += 1
    target.changed = True
    try:
        return await _asked(services, given, target)
    finally:
        target.open -= 1
        target.changed = True
        target.last_used = time.time()
        if slot:
            lane.leave(target, None)
        if not target.open:
            services.replica_idle()


async def _asked(services: Services, given: Given, target: Target) -> Usage | None:
    made = await outgoing.make(services, given, target)
    if isinstance(made, Reply):
        return NOTHING
    conn = await target.connect()
    answer = _Counted()
    try:
        size = sum(map(len, made.body))
        head = b"%bx-request-id: %b-mirror\r\ncontent-length: %d\r\n\r\n" % (made.head, given.id, size)
        conn.begin(answer, head, made.body or (b"",), False)
        return tokens(answer.tail) if await answer.done else None
    finally:
        if not answer.done.done() or answer.done.cancelled():
            conn.close()
