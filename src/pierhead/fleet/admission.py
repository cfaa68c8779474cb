"""The queue for memory: starts get it in the order in which they asked, and wait while others are busy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pierhead.engines.base import Plan
from pierhead.errors import OutOfMemory
from pierhead.fleet.scheduler import Claim, Decision, Machine, Room, decide, free_room
from pierhead.fleet.state import State

_TICK = 0.5  # seconds between looks at the machine's memory, while somebody waits
_LAG = 3.0  # seconds in which memory that was given back may not be told as free yet


_GOING = frozenset({State.DOZING, State.DRAINING, State.STOPPING})


@dataclass(eq=False)
class Ticket:
    """One start that wants memory: ``plan`` and ``smaller`` as in ``decide``, which call nothing that waits.

    ``place`` is told the plan as soon as its memory is promised; ``tell`` what it waits for. ``patience`` in seconds.
    """

    replica: str
    plan: Callable[[Room], Plan]
    smaller: Callable[[Room], Plan] | None
    evict: bool
    place: Callable[[Plan], None]
    tell: Callable[[str], None]
    patience: float
    placed: Plan | None = None
    why: OutOfMemory | None = None  # what it last waited for
    short: float = 0.0  # since when what was promised is not there, though nobody leaves any more
    granted: asyncio.Future[Plan] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """Who waits, first come first served: nobody who came later is served before, so that a big one gets its turn.

    ``claims`` is the ledger, ``evict`` begins to end replicas. Look again (``look``) whenever either may have changed.
    """

    def __init__(
        self,
        claims: Callable[[], list[Claim]],
        machine: Callable[[], Machine],
        reserve: int,
        evict: Callable[[Sequence[str], Ticket], None],
    ) -> None:
        self._claims = claims
        self._machine = machine
        self._reserve = reserve
        self._evict = evict
        self._queue: list[Ticket] = []
        self._soon: asyncio.Handle | None = None

    @property
    def waiting(self) -> int:
        """How many starts wait for memory."""
        return len(self._queue)

    async def admit(self, ticket: Ticket) -> Plan:
        """The plan, once its memory is free. OutOfMemory when it never will be, or not within its patience."""
        self._queue.append(ticket)
        self._turn()
        try:
            async with asyncio.timeout(ticket.patience or None):
                return await ticket.granted
        except TimeoutError as exc:
            why = ticket.why or OutOfMemory("what holds the memory did not end in time")
            text = f"{why.message}, and nothing came free within {ticket.patience:g} s"
            raise OutOfMemory(text, hint=why.hint, data=why.data) from exc
        finally:
            if ticket in self._queue:  # given up, or ended while it waited
                self._queue.remove(ticket)
                self.look()

    def look(self) -> None:
        """Something has changed: see soon whose turn it is; many calls in a row make one."""
        if self._queue:
            self._arm(0.0)

    def close(self) -> None:
        """Look no more."""
        if self._soon is not None:
            self._soon.cancel()

    def _arm(self, delay: float) -> None:
        if self._soon is not None:
            self._soon.cancel()
        loop = asyncio.get_running_loop()
        self._soon = loop.call_later(delay, self._turn) if delay else loop.call_soon(self._turn)

    def _turn(self) -> None:
        for ticket in list(self._queue):
            if ticket.granted.done():
                self._queue.remove(ticket)
            elif ticket.placed is None and not self._decide(ticket):
                break
            elif ticket.placed is not None and self._room(ticket, ticket.placed):
                self._queue.remove(ticket)
                ticket.granted.set_result(ticket.placed)
            elif ticket.placed is not None and self._taken(ticket):
                self._decide(ticket)
        if self._queue:
            self._arm(_TICK)

    def _decide(self, ticket: Ticket) -> bool:
        """Promise it memory or refuse it; False when it must wait, and all behind it."""
        claims = [c for c in self._claims() if c.replica != ticket.replica]
        try:
            outcome = decide(
                claims, self._machine(), self._reserve, ticket.plan, evict=ticket.evict, smaller=ticket.smaller
            )
        except Exception as exc:  # whatever a plan raises is for the one who asked for it
            self._queue.remove(ticket)
            ticket.granted.set_exception(exc)
            return True
        if ticket.placed is not None and not isinstance(outcome, Decision):
            return True  # it keeps its place, and waits on
        if isinstance(outcome, Decision):
            ticket.placed = outcome.plan
            ticket.place(outcome.plan)
            if outcome.evict:
                self._evict(outcome.evict, ticket)
            return True
        if ticket.patience <= 0:
            self._queue.remove(ticket)
            ticket.granted.set_exception(outcome.why)
            return True
        if ticket.why is None:
            names = ", ".join(dict.fromkeys(h["model"] for h in outcome.why.data["holders"])) or "others"
            ticket.tell(f"waiting for memory, which {names} will give back when idle")
        ticket.why = outcome.why
        return False

    def _taken(self, ticket: Ticket) -> bool:
        """Whether others have what it was promised: those who were to leave have, and it is not free for some time."""
        if any(c.state in _GOING for c in self._claims()):
            ticket.short = 0.0
            return False
        now = asyncio.get_running_loop().time()
        ticket.short = ticket.short or now
        if now - ticket.short < _LAG:
            return False
        ticket.short = 0.0
        return True

    def _room(self, ticket: Ticket, plan: Plan) -> bool:
        """Whether what was promised is free by now; those who are promised memory after it do not count."""
        later = {t.replica for t in self._queue[self._queue.index(ticket) :]}
        present = [c for c in self._claims() if c.replica not in later]
        room = free_room(self._machine(), present, self._reserve)
        free = {device.name: device.free for device in room.devices}
        return room.memory >= plan.memory and all(free.get(name, 0) >= need for name, need in plan.devices.items())
