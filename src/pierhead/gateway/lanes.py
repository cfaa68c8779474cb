"""The lane of one route: who waits for a slot, which replica gets whom, and how those are; sends nothing.

A request that finds its one replica with a free slot, and nobody waiting, costs a comparison and a counter.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pierhead.config import TrafficSettings
from pierhead.gateway.faults import Fault
from pierhead.gateway.prompt import BLOCK_TOKENS
from pierhead.routing.balance import POLICIES, CacheAware, Job, Policy, Sessions
from pierhead.routing.health import Circuit
from pierhead.routing.queue import FairQueue, Waiting

if TYPE_CHECKING:
    from pierhead.gateway.upstream import Target

T = TypeVar("T")
_START_GUESS = 5.0  # seconds that a start is taken to last before one was seen


class Place(NamedTuple):
    """Where a waiting request stands; ``expected`` seconds (None: not known); ``note`` is how a start gets on."""

    position: int
    expected: float | None
    note: str = ""


class Ticket:
    """One request on its way to a slot; ``deadline`` is monotonic.

    ``tell`` hears every ``notice`` seconds how it stands; ``place`` is how it stood on arrival, when it had to wait.
    """

    __slots__ = ("cost", "deadline", "job", "key", "notice", "place", "priority", "session", "since", "tell", "tried")

    def __init__(self, key: str, cost: int, deadline: float, priority: int = 0) -> None:
        self.key = key
        self.cost = cost
        self.deadline = deadline
        self.priority = priority
        self.session = ""
        self.job: Job | None = None
        self.tried: set[str] = set()
        self.since = time.monotonic()
        self.notice = 0.0
        self.tell: Callable[[Place], None] | None = None
        self.place: Place | None = None


class Lane:
    """The traffic of one route; lives on from snapshot to snapshot."""

    def __init__(self, name: str, settings: TrafficSettings) -> None:
        self.name = name
        self.settings = settings
        self.queue = FairQueue(settings.queue_limit)
        self.targets: tuple[Target, ...] = ()
        self.waiting = 0  # requests that wait for a slot or for a start
        self.refused = 0
        self.expired = 0
        self.waited = 0.0  # seconds, of all that had to wait
        self.served = 0  # of those that had to wait
        self._only: Target | None = None  # the target, where there is no choice
        self._by_name: dict[str, Target] = {}
        self._policy: Policy | None = None
        self._sessions = Sessions()
        self._start_s = _START_GUESS
        self._start_began = 0.0
        self._alarm_at = 0.0  # when those who wait are looked at again, as a suspended replica may be tried then

    # --- the usual way ------------------------------------------------------------------------------------------------

    def claim(self) -> Target | None:
        """A slot of the only target, when one is free and nobody waits; None: see ``take``."""
        target = self._only
        if target is None or self.waiting or (target.slots and target.busy >= target.slots):
            return None
        target.busy += 1
        return target

    def lend(self) -> Target | None:
        """A target for work that takes no slot; None when nothing runs."""
        if self._only is not None:
            return self._only
        healthy = self._healthy(time.monotonic())
        return min(healthy, key=lambda t: t.open) if healthy else None

    def spare(self) -> Target | None:
        """A slot that nobody waits for, of whichever target; None when there is none."""
        target = self.claim()
        if target is None and not self.waiting and (free := _free(self._healthy(time.monotonic()))):
            target = min(free, key=lambda t: t.open)
            target.busy += 1
        return target

    @property
    def chooses(self) -> bool:
        """Whether there is more than one target."""
        return len(self.targets) > 1

    # --- what is there ------------------------------------------------------------------------------------------------

    def update(self, targets: tuple[Target, ...]) -> None:
        """These are the route's targets now."""
        if targets == self.targets:
            return
        for target in self.targets:
            if target not in targets:
                target.lanes.discard(self)
                if self._policy is not None:
                    self._policy.remove(target.replica)
        if len(targets) > 1 and self._policy is None:
            self._policy = self._make_policy()
        self.targets = targets
        self._by_name = {t.replica: t for t in targets}
        self._only = targets[0] if len(targets) == 1 else None
        for target in targets:
            target.lanes.add(self)
            if self._policy is not None:
                self._policy.add(target.replica, target.context * max(target.slots, 1) // BLOCK_TOKENS)
        if self.waiting:
            self.pump()
            if not targets:
                self._wake_all()

    def adopt(self, target: Target) -> None:
        """A target that the daemon named before its snapshot did."""
        if target not in self.targets and not target.gone:
            self.update((*self.targets, target))

    def _make_policy(self) -> Policy:
        if self.settings.policy == "cache":
            return CacheAware(self.settings.cache_blocks)
        return POLICIES[self.settings.policy]()

    def _wake_all(self) -> None:
        """Nothing runs any more: let those who wait see to it that something does."""
        for guest in self.queue:
            assert isinstance(guest, _Guest)
            self.queue.remove(guest)
            if not guest.future.done():
                guest.future.set_result(None)

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _healthy(self, now: float) -> tuple[Target, ...]:
        if self._only is not None:
            return self.targets
        # With nobody well it is better to try than to refuse.
        return tuple(t for t in self.targets if t.health.allows(now)) or self.targets

    def take(self, ticket: Ticket, now: float) -> Target | None:
        """A free slot for ``ticket``; None when it must wait."""
        if len(self.queue):
            return None
        healthy = self._healthy(now)
        free = _free(healthy)
        return self._assign(ticket, healthy, free, now) if free else None

    def other(self, ticket: Ticket) -> bool:
        """Whether somebody is left who could be asked instead of those tried."""
        now = time.monotonic()
        return any(t.replica not in ticket.tried and t.health.allows(now) for t in self.targets)

    def retake(self, ticket: Ticket) -> Target | None:
        """Another replica for a request that failed, at once, even beyond its slots; None when nobody is left."""
        now = time.monotonic()
        left = tuple(t for t in self.targets if t.replica not in ticket.tried and t.health.allows(now))
        return self._assign(ticket, left, _free(left) or left, now) if left else None

    def rival(self, ticket: Ticket, beside: Target, job: Job | None) -> Target | None:
        """A free slot of another replica than ``beside``, for a second try at a time; None when there is none."""
        now = time.monotonic()
        free = [t for t in _free(self.targets) if t is not beside and t.health.allows(now)]
        if not free:
            return None
        second = Ticket(ticket.key, ticket.cost, ticket.deadline)
        second.job = job
        return self._assign(second, free, free, now)

    def _assign(self, ticket: Ticket, healthy: Sequence[Target], free: Sequence[Target], now: float) -> Target:
        target = free[0]
        if self._policy is not None and len(self.targets) > 1:
            names = [t.replica for t in free]
            job = ticket.job
            if job is None:
                job = ticket.job = Job(ticket.cost)
            chosen = self._sessions.place(ticket.session, [t.replica for t in healthy]) if ticket.session else ""
            if chosen not in names:  # no session, or its replica is busy: this once elsewhere
                chosen = self._policy.choose(job, names, now)
            self._policy.dispatch(job, chosen, now)
            target = self._by_name[chosen]
        if target.health.state is not Circuit.CLOSED:
            target.health.sending(now)
        target.busy += 1
        return target

    # --- waiting ------------------------------------------------------------------------------------------------------

    async def seat(
        self,
        ticket: Ticket,
        start: Callable[[], Awaitable[Target]],
        progress: Callable[[], str] = lambda: "",
    ) -> Target:
        """A slot, however long that takes: ``start`` brings up a replica when none runs. Fault 429, 504, or start's."""
        if self.waiting >= self.settings.queue_limit:
            raise self._full()
        self.waiting += 1
        try:
            while True:
                if not self.targets:
                    await self._started(ticket, start, progress)
                target = self.take(ticket, time.monotonic()) or await self._queued(ticket)
                if target is not None:
                    return target
        finally:
            self.waiting -= 1
            if ticket.place is not None:
                self.waited += time.monotonic() - ticket.since
                self.served += 1

    async def _started(
        self, ticket: Ticket, start: Callable[[], Awaitable[Target]], progress: Callable[[], str]
    ) -> None:
        """Wait for a replica. A start counts as queueing: its place is that among all who wait for it."""
        position, began = self.waiting, time.monotonic()
        if position == 1 or not self._start_began:
            self._start_began = began

        def place() -> Place:
            rest = self._start_s - (time.monotonic() - self._start_began)
            return Place(position, max(rest, 0.0), progress() or "the model starts")

        if ticket.place is None:
            ticket.place = place()
        task = asyncio.ensure_future(start())
        try:
            target = await self._patient(ticket, task, place)
        finally:
            if not task.done():
                task.cancel()
        if self._start_began == began:
            self._start_s += 0.5 * (time.monotonic() - began - self._start_s)
        self.adopt(target)
        if target not in self.targets:
            raise Fault(503, "engine_gone", "the model was stopped while it started.", hint="Try again.")

    async def _queued(self, ticket: Ticket) -> Target | None:
        """Wait in the queue; None when there is nothing left to wait for."""
        guest = _Guest(ticket)
        future = guest.future
        if not self.queue.put(guest):
            raise self._full()
        self._await_healing()

        def place() -> Place:
            return Place(self.queue.position(guest), self.queue.wait(guest, self._servers))

        if ticket.place is None:
            ticket.place = place()
        try:
            return await self._patient(ticket, future, place)
        except BaseException:
            self.queue.remove(guest)
            if future.done() and not future.cancelled() and (target := future.result()) is not None:
                self.leave(target, ticket.job)
            raise

    async def _patient(self, ticket: Ticket, work: asyncio.Future[T], place: Callable[[], Place]) -> T:
        """The result of ``work``, telling the client how it stands; Fault 504 when its time is over."""
        told = ticket.since
        while True:
            now = time.monotonic()
            until = ticket.deadline
            if ticket.tell is not None and ticket.notice > 0:
                until = min(until, told + ticket.notice)
            await asyncio.wait((work,), timeout=max(0.0, until - now))
            if work.done():
                return work.result()
            now = time.monotonic()
            if now >= ticket.deadline:
                self.expired += 1
                raise self._late(now - ticket.since)
            if ticket.tell is not None:
                told = now
                ticket.tell(place())

    def pump(self) -> None:
        """Let in who may; called when a slot became free."""
        now = time.monotonic()
        while len(self.queue):
            healthy = self._healthy(now)
            free = _free(healthy)
            guest = self.queue.pop(now) if free else None
            if guest is None:
                self._await_healing()
                return
            assert isinstance(guest, _Guest)
            if not guest.future.done():
                guest.future.set_result(self._assign(guest.ticket, healthy, free, now))

    def _await_healing(self) -> None:
        """Let in who waits when a suspended replica with a free slot may be tried again: no request may end before."""
        if self._only is not None:
            return
        now, soonest = time.monotonic(), min((t.health.opens for t in _free(self.targets)), default=0.0)
        if soonest and not now < self._alarm_at <= soonest:
            self._alarm_at = soonest
            asyncio.get_running_loop().call_later(max(0.0, soonest - now) + 0.001, self.pump)

    def leave(self, target: Target, job: Job | None, seconds: float = 0.0, cost: int = 0) -> None:
        """A slot is free again, which a request of ``cost`` had for ``seconds`` (0: it was not used)."""
        target.busy -= 1
        if seconds and target.slots:
            self.queue.speed.served(seconds, cost)
        if job is not None and self._policy is not None:
            self._policy.done(job, time.monotonic())
        for lane in target.lanes:
            if lane.waiting:
                lane.pump()

    def first_token(self, job: Job) -> None:
        """The answer to ``job`` has begun."""
        if self._policy is not None:
            self._policy.first_token(job, time.monotonic())

    # --- health -------------------------------------------------------------------------------------------------------

    def ended(self, target: Target, verdict: bool | None) -> None:
        """How a request ended: well, by the replica's fault, or (None) without telling anything about it."""
        health = target.health
        if verdict is None:
            health.abandoned(time.monotonic())
        elif verdict:
            health.success(time.monotonic())
        else:
            health.failure(time.monotonic(), random.random())  # noqa: S311 - spreads retries, guards nothing

    # --- refusals -----------------------------------------------------------------------------------------------------

    @property
    def _servers(self) -> int:
        return sum(t.slots for t in self.targets) or 1

    def retry_after(self) -> int:
        """Seconds after which a newcomer would probably find room."""
        if self.targets:
            return self.queue.retry_after(self._servers)
        rest = self._start_s - (time.monotonic() - self._start_began) if self._start_began else self._start_s
        return min(600, max(1, round(rest)))

    def _full(self) -> Fault:
        self.refused += 1
        seconds = self.retry_after()
        return Fault(
            429,
            "queue_full",
            f"the queue of '{self.name}' is full: {self.waiting} waiting.",
            hint=f"Try again in {seconds} s. The limit is queue_limit in [gateway.traffic].",
            headers=((b"retry-after", b"%d" % seconds),),
        )

    def _late(self, waited: float) -> Fault:
        return Fault(
            504,
            "queue_timeout",
            f"no replica of '{self.name}' was free within {waited:.1f} s.",
            hint="Wait longer with the header x-request-timeout, or run it with more slots: --option parallel=N.",
            headers=((b"retry-after", b"%d" % self.retry_after()),),
        )


class _Guest(Waiting):
    """A ticket in the queue; the future's result is its target, or None when there is nothing left to wait for."""

    __slots__ = ("future", "ticket")

    def __init__(self, ticket: Ticket) -> None:
        super().__init__(ticket.key, ticket.cost, ticket.priority, ticket.deadline)
        self.ticket = ticket
        self.future: asyncio.Future[Target | None] = asyncio.get_running_loop().create_future()


def _free(targets: Sequence[Target]) -> list[Target]:
    return [t for t in targets if not t.slots or t.busy < t.slots]
