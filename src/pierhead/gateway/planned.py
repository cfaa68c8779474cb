"""A request for a configured route: led to a destination, to a fallback when that fails, and copied; asks no engine.

It moves on only while nothing was sent to the client. The head of a stream is held back until its first event, so that
a destination which breaks before it can still be replaced.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pierhead.gateway import shadow
from pierhead.gateway.faults import Fault
from pierhead.gateway.plans import stream_error, trouble
from pierhead.gateway.seated import Seated
from pierhead.gateway.translate import headers
from pierhead.gateway.usage import NOTHING
from pierhead.routing.health import Circuit

if TYPE_CHECKING:
    from pierhead.gateway.ask import Ask
    from pierhead.gateway.dialects.base import Translation
    from pierhead.gateway.holder import Hold
    from pierhead.gateway.link import Trouble
    from pierhead.gateway.outgoing import Given
    from pierhead.gateway.routes import Entry
    from pierhead.gateway.upstream import Answer


class Planned(Seated):
    """Follows a plan from destination to destination; a request for a plain model has none."""

    _copy = ""  # who gets a copy, once the request is sent
    _late: asyncio.TimerHandle | None = None
    _head: tuple[Answer, Translation | None, bool] | None = None

    # --- who answers --------------------------------------------------------------------------------------------------

    def _decided(self, route: Entry, ask: Ask) -> Entry:
        """The destination of this request; Fault when there is none."""
        plan, request = route.plan, self._request
        assert plan is not None
        named = headers(request.forward) if plan.reads_headers else None
        decision = plan.decide(request.key_id, named, self._text)
        self._plan, self._then, self._copy = plan, decision.then, decision.mirror
        entry, now = self._services.routes.destination(decision.first), time.monotonic()
        while self._then and (entry is None or entry.ill(now)):
            following = self._services.routes.destination(self._then[0])
            if entry is not None and (following is None or "error" not in plan.on.get(following.name, ())):
                break
            entry, self._then = following, self._then[1:]
        if entry is None:
            raise Fault(
                503, "no_destination", f"nobody can answer for '{route.name}' now.", hint="See: pier route check"
            )
        self._enter(entry)
        return entry

    def _enter(self, entry: Entry) -> None:
        self._entry = entry
        self._stats = self._services.metrics.model(entry.name)
        self._extra = b"x-pierhead-model: %b\r\n" % entry.name.encode("ascii", "backslashreplace")
        if len(entry.targets) == 1 and (health := entry.targets[0].health).state is not Circuit.CLOSED:
            health.sending(time.monotonic())  # this request decides whether it is well again
        plan = self._plan
        assert plan is not None
        limits = [t for t in (plan.timeout, entry.timeout) if t > 0]
        if limits:
            self._late = asyncio.get_running_loop().call_later(min(limits), self._too_late, min(limits))

    # --- who is next --------------------------------------------------------------------------------------------------

    def _fail(self, fault: Fault) -> None:
        """Ask the next one, if the plan has one for this trouble; else tell the client."""
        if self._held:  # nothing has left yet: it is as if the stream had not begun
            self._held, self._stream, self.status, self.usage = False, None, 0, NOTHING
        if fault.code == "provider_unreachable":
            self._faulty = True
        if self._plan is not None:
            self._trouble = trouble(fault)
            if self._next():
                return
        super()._fail(fault)

    def _next(self) -> bool:
        """Whether another destination is asked now."""
        plan, kind, request = self._plan, self._trouble, self._request
        assert plan is not None
        may = kind is not None and self._body and self._stream is None and not self.early
        if not may or (request.holder is not None and self._hold is None):
            return False  # the client's own fault, or its key's
        while self._then:
            name, self._then = self._then[0], self._then[1:]
            entry = self._services.routes.destination(name) if kind in plan.on.get(name, ()) else None
            if entry is not None and self._regranted(entry):
                self._leave(kind)
                self._enter(entry)
                self._again()
                return True
        return False

    def _regranted(self, entry: Entry) -> bool:
        """Exchange what the key was granted for the same at the other's price; what is not there yet is waited for."""
        holder, hold, ask, operation = self._request.holder, self._hold, self._ask, self._request.operation
        if holder is None or hold is None or ask is None or operation is None:
            return True
        hold.settle(NOTHING, False)
        self._hold = None
        self._services.metrics.holds -= 1
        try:
            granted = holder.begin(ask, entry, self._size, operation, self._text)
        except Fault:
            self._then = ()
            return False
        if granted is not None:
            self._granted(granted)
        return True

    def _granted(self, hold: Hold) -> None:
        """The key has been granted this."""
        raise NotImplementedError

    def _leave(self, kind: Trouble | None) -> None:
        """Book the attempt and forget it."""
        plan, entry, target = self._plan, self._entry, self._target
        assert plan is not None
        assert entry is not None
        plan.count(entry.name, kind or "error")
        self._disarm()
        if self._conn is not None:
            self._conn.close()
            self._conn = None
        if target is not None:
            self._release(target, False, NOTHING)
            self._target = None
        self._attempts += 1
        self._asked, self._calls = False, None
        self._ticket = self._outgoing = self._answer = self._collected = self._trouble = None
        self._sat, self._cost, self._tries = 0.0, 0, 0
        self._retried = self._revived = self._faulty = self._pooled = self._chunked = False

    def _too_late(self, seconds: float) -> None:
        """The destination took too long to its first byte."""
        self._late = None
        entry = self._entry
        name = entry.name if entry is not None else ""
        self._drop()
        self._faulty = True
        self._fail(Fault(504, "timeout", f"'{name}' did not begin its answer within {seconds:g} s.", source="engine"))

    def _disarm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def cancel(self) -> None:
        """The client went away, perhaps before anything had left for it."""
        if self._held:
            self.status = 0
        super().cancel()

    def expire(self, fault: Fault) -> None:
        """All its time is over: nobody else is asked."""
        self._then = ()
        super().expire(fault)

    # --- the first byte -----------------------------------------------------------------------------------------------

    def _open(self, answer: Answer, translation: Translation | None, strips: bool) -> None:
        if self._plan is not None and answer.sse and not self.early:
            self._held, self._head = True, (answer, translation, strips)
            return
        self._disarm()
        super()._open(answer, translation, strips)

    def _unheld(self, piece: bytes) -> bool:
        """The first bytes are here: send the head that was held back; False when they tell of an error."""
        fault = stream_error(piece)
        if fault is not None:
            self._drop()
            self._answer = None
            self._fail(fault)
            return False
        self._held, self._then = False, ()
        self._body = []
        self._disarm()
        head, self._head = self._head, None
        assert head is not None
        answer, translation, strips = head
        super()._open(answer, translation, strips)
        return True

    def _counted(self, ok: bool) -> None:
        """The request has ended."""
        self._disarm()
        if self._plan is not None and self._entry is not None:
            self._plan.count(self._entry.name, self._trouble or ("ok" if ok else "aborted"))

    # --- the copy -----------------------------------------------------------------------------------------------------

    def _mirror(self, given: Given) -> None:
        """Send a copy, within its budget; whatever becomes of it, this request never hears of it."""
        name, self._copy = self._copy, ""
        budget = self._plan.budget if self._plan is not None else None
        entry = self._services.routes.destination(name)
        if entry is None or budget is None:
            return
        estimate = self._guess(given.ask)
        if self._size > shadow.LARGEST:
            budget.skipped += 1
        elif budget.take(estimate, time.monotonic(), time.time()):
            self._services.run(shadow.send(self._services, given._replace(entry=entry, calls=None), budget, estimate))
