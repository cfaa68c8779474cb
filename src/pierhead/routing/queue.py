"""The order in which waiting requests are let in: bounded, by priority, fair between keys, with deadlines."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from math import ceil

SHARE = 8  # releases of higher priority after which a lower one has its turn
_WEIGHT = 0.1  # of the newest measurement in a moving average


class Waiting:
    """One request in the queue, subclassed for what waits; ``cost`` is in tokens, ``deadline`` in monotonic seconds."""

    __slots__ = ("cost", "deadline", "key", "order", "priority", "queued", "start")

    def __init__(self, key: str, cost: int, priority: int, deadline: float) -> None:
        self.key = key
        self.cost = max(1, cost)
        self.priority = priority
        self.deadline = deadline
        self.start = 0.0
        self.order = 0
        self.queued = False

    def rank(self) -> tuple[float, int]:
        """What its level is sorted by."""
        return self.start, self.order

    def term(self) -> tuple[float, int]:
        """What deadlines are sorted by."""
        return self.deadline, self.order


class _Level:
    """The waiting of one priority, by start-time fair queueing: each key's requests begin where its last one ends."""

    __slots__ = ("clock", "cost", "ends", "passed", "waiting")

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []  # sorted; a list's memmove beats a heap's lazy removal at these lengths
        self.ends: dict[str, float] = {}  # where each key's next request begins
        self.clock = 0.0  # the start of the request let in last
        self.cost = 0
        self.passed = 0  # releases of higher levels since this one had its turn

    def put(self, entry: Waiting) -> None:
        entry.start = max(self.clock, self.ends.get(entry.key, 0.0))
        self.ends[entry.key] = entry.start + entry.cost
        insort(self.waiting, entry, key=Waiting.rank)
        self.cost += entry.cost

    def index(self, entry: Waiting) -> int:
        return bisect_left(self.waiting, entry.rank(), key=Waiting.rank)

    def take(self, at: int) -> None:
        entry = self.waiting.pop(at)
        self.cost -= entry.cost
        bound = 2 * len(self.waiting) + 64
        if len(self.ends) > bound:
            self.ends = {key: end for key, end in self.ends.items() if end > self.clock}
            if len(self.ends) > bound:
                here = {entry.key for entry in self.waiting}
                self.ends = {key: end for key, end in self.ends.items() if key in here}

    def refund(self, entry: Waiting) -> None:
        """Nobody pays for what was not served."""
        if entry.key in self.ends:
            self.ends[entry.key] -= entry.cost


class FairQueue:
    """At most ``limit`` requests that wait for one of ``servers`` slots.

    Higher priorities go first, but every level with waiting requests has one of ``share`` turns in any case. Within a
    level keys share by tokens, so that a key with a thousand requests does not delay another key's first.
    """

    def __init__(self, limit: int, share: int = SHARE) -> None:
        self.limit = limit
        self.speed = Speed()
        self._share = max(1, share)
        self._levels: dict[int, _Level] = {}
        self._order: tuple[int, ...] = ()  # priorities with somebody waiting, the highest first
        self._terms: list[Waiting] = []
        self._count = 0
        self._serial = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Waiting]:
        """Everybody who waits, level by level; not exactly the order of release."""
        for priority in self._order:
            yield from tuple(self._levels[priority].waiting)

    @property
    def full(self) -> bool:
        """Whether ``put`` would be refused."""
        return self._count >= self.limit

    def put(self, entry: Waiting) -> bool:
        """Let ``entry`` wait; False when the queue is full."""
        if self._count >= self.limit or entry.queued:
            return False
        self._serial += 1
        entry.order = self._serial
        level = self._levels.get(entry.priority)
        if level is None:
            level = self._levels[entry.priority] = _Level()
            self._order = tuple(sorted(self._levels, reverse=True))
        level.put(entry)
        insort(self._terms, entry, key=Waiting.term)
        entry.queued = True
        self._count += 1
        return True

    def pop(self, now: float) -> Waiting | None:
        """Who is let in next, of those whose deadline has not passed."""
        while self._count:
            priority = self._turn()
            level = self._levels[priority]
            entry = level.waiting[0]
            self._forget(entry, 0)
            if entry.deadline <= now:
                continue
            level.clock = max(level.clock, entry.start)
            level.passed = 0
            for lower in self._order:
                if lower < priority:
                    self._levels[lower].passed += 1
            return entry
        return None

    def remove(self, entry: Waiting) -> bool:
        """It waits no longer: whoever asked has gone. False when it did not wait."""
        if not entry.queued:
            return False
        level = self._levels[entry.priority]
        level.refund(entry)
        self._forget(entry, level.index(entry))
        return True

    def expire(self, now: float) -> list[Waiting]:
        """Take out everybody whose deadline has passed."""
        late: list[Waiting] = []
        while self._terms and self._terms[0].deadline <= now:
            entry = self._terms[0]
            self.remove(entry)
            late.append(entry)
        return late

    @property
    def next_deadline(self) -> float | None:
        """When ``expire`` has something to do."""
        return self._terms[0].deadline if self._terms else None

    def position(self, entry: Waiting) -> int:
        """Its place, 1 for the next, if nobody comes and lower priorities wait; 0 when it does not wait."""
        if not entry.queued:
            return 0
        ahead = sum(len(self._levels[p].waiting) for p in self._order if p > entry.priority)
        return ahead + self._levels[entry.priority].index(entry) + 1

    def wait(self, entry: Waiting, servers: int) -> float | None:
        """Seconds until it is probably let in; None before anything was measured."""
        if not entry.queued:
            return 0.0
        level = self._levels[entry.priority]
        ahead = sum(self._levels[p].cost for p in self._order if p > entry.priority)
        ahead += sum(other.cost for other in level.waiting[: level.index(entry)])
        return self.speed.seconds(ahead, self.position(entry), servers)

    def retry_after(self, servers: int) -> int:
        """Whole seconds until a newcomer would be let in at once, at the measured speed: 1 to 600."""
        cost = sum(level.cost for level in self._levels.values())
        seconds = self.speed.seconds(cost, self._count + 1, servers)
        return 1 if seconds is None else min(600, max(1, ceil(seconds - 1e-6)))

    def _turn(self) -> int:
        highest, *lower = self._order
        if lower:
            neglected = max(lower, key=lambda p: self._levels[p].passed)
            if self._levels[neglected].passed >= self._share - 1:
                return neglected
        return highest

    def _forget(self, entry: Waiting, at: int) -> None:
        level = self._levels[entry.priority]
        level.take(at)
        if not level.waiting:
            del self._levels[entry.priority]
            self._order = tuple(sorted(self._levels, reverse=True))
        terms = self._terms
        del terms[bisect_left(terms, entry.term(), key=Waiting.term)]
        entry.queued = False
        self._count -= 1


class Speed:
    """How long requests occupy a slot, by moving averages: in seconds for each, and for each token of cost."""

    __slots__ = ("_cost", "_seconds", "_sure")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._cost = 0.0
        self._sure = 0.0  # how much of the averages is measured: the start counts less than its weight

    def served(self, seconds: float, cost: int) -> None:
        """A request of ``cost`` occupied a slot for ``seconds``."""
        self._seconds += _WEIGHT * (seconds - self._seconds)
        self._cost += _WEIGHT * (cost - self._cost)
        self._sure += _WEIGHT * (1 - self._sure)

    def seconds(self, ahead: int, position: int, servers: int) -> float | None:
        """Until ``position``, with a cost of ``ahead`` before it, has a slot: one of the running ones ends, then those
        ahead are served; None before anything was measured.
        """
        if not self._sure or position < 1:
            return None
        mean = self._seconds / self._sure
        per_cost = mean / max(1.0, self._cost / self._sure)
        return (mean + ahead * per_cost) / max(1, servers)
