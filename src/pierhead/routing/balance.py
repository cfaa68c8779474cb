"""Which replica gets the next request: policies that see dispatches, first tokens and endings, and nothing else."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Protocol

from pierhead.routing.prefix import PrefixIndex

RATE = 2000.0  # tokens of prompt a second that a replica is taken to read before one was measured
_WEIGHT = 0.2  # of the newest measurement in a moving average


class Job:
    """One request as a policy sees it: ``tokens`` of prompt, of which each block of ``chain`` stands for some.

    A request that is sent to two replicas is two jobs.
    """

    __slots__ = ("at", "block_tokens", "chain", "load", "miss", "reading", "replica", "tokens")

    def __init__(self, tokens: int, chain: Sequence[int] = (), block_tokens: int = 64) -> None:
        self.tokens = tokens
        self.chain = chain
        self.block_tokens = block_tokens
        self.replica = ""
        self.miss = tokens  # tokens that the replica must probably read
        self.at = 0.0
        self.reading = False  # dispatched, and its first token has not come yet
        self.load: Load | None = None

    def missing(self, blocks: int) -> int:
        """Tokens to read where ``blocks`` leading blocks are cached."""
        return max(0, self.tokens - blocks * self.block_tokens)


class Policy(Protocol):
    """Chooses among replicas; times are monotonic seconds.

    ``blocks`` is how many a replica's cache holds (0: not known). ``choose`` decides and records nothing; every job
    that is sent is told by ``dispatch``, whoever chose its replica. ``first_token`` may be left out or repeated;
    ``done`` comes once, also for a job that failed.
    """

    def add(self, replica: str, blocks: int = 0) -> None: ...
    def remove(self, replica: str) -> None: ...
    def choose(self, job: Job, among: Sequence[str], now: float) -> str: ...
    def dispatch(self, job: Job, replica: str, now: float) -> None: ...
    def first_token(self, job: Job, now: float) -> None: ...
    def done(self, job: Job, now: float) -> None: ...


class Load:
    """What one replica was given: ``reading`` tokens wait for their first token, ``tokens`` for their end."""

    __slots__ = ("given", "order", "rate", "reading", "requests", "since", "tokens", "waiting")

    def __init__(self, given: int, rate: float) -> None:
        self.requests = 0
        self.tokens = 0
        self.reading = 0
        self.waiting = 0  # requests whose first token has not come
        self.given = given  # tokens to read, of all time: breaks ties
        self.rate = rate
        self.since = 0.0  # when the prompt that is read now was begun
        self.order: deque[Job] = deque()  # as they were sent; those whose first token came are taken out late

    def queued(self, now: float) -> float:
        """Tokens still to be read there: what was sent, less what it has probably read of it since the last sign."""
        reading = self.reading
        if not reading:
            return 0.0
        return reading - min(self.order[0].miss, (now - self.since) * self.rate)

    def sent(self, job: Job, now: float) -> None:
        """A job more."""
        if not self.waiting:
            self.since = now
        self.requests += 1
        self.waiting += 1
        self.tokens += job.tokens
        self.reading += job.miss
        self.given += job.miss
        self.order.append(job)

    def read(self, job: Job, now: float) -> None:
        """A job's prompt is read, or will not be."""
        job.reading = False
        self.waiting -= 1
        self.reading -= job.miss
        self.since = now
        order = self.order
        while order and not order[0].reading:
            order.popleft()
        if len(order) > 2 * self.waiting + 64:
            self.order = deque(j for j in order if j.reading)


class _Counting:
    """The books that all policies keep."""

    def __init__(self) -> None:
        self.loads: dict[str, Load] = {}

    def add(self, replica: str, blocks: int = 0) -> None:
        """A newcomer is taken for a replica that was given as much, and reads as fast, as the others on average."""
        if replica not in self.loads:
            n = len(self.loads)
            given = sum(x.given for x in self.loads.values()) // n if n else 0
            rate = sum(x.rate for x in self.loads.values()) / n if n else RATE
            self.loads[replica] = Load(given, rate)

    def remove(self, replica: str) -> None:
        """What was sent there may still end; it is not counted any more."""
        self.loads.pop(replica, None)

    def dispatch(self, job: Job, replica: str, now: float) -> None:
        """``job`` goes to ``replica``."""
        job.replica, job.at, job.reading = replica, now, True
        load = self.loads.get(replica)
        job.load = load
        if load is not None:
            load.sent(job, now)

    def first_token(self, job: Job, now: float) -> None:
        """The prompt is read."""
        load = job.load
        if load is None or not job.reading:
            return
        took = now - max(load.since, job.at)
        if job.miss >= 64 and took > 0:  # a short prompt says nothing about the speed of reading
            load.rate += _WEIGHT * (min(job.miss / took, 1e6) - load.rate)
        load.read(job, now)

    def done(self, job: Job, now: float) -> None:
        """The answer is complete, or there will be none."""
        load, job.load = job.load, None
        if load is None:
            return
        load.requests -= 1
        load.tokens -= job.tokens
        if job.reading:
            load.read(job, now)


class RoundRobin(_Counting):
    """Each in turn, whatever they do."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = -1

    def choose(self, job: Job, among: Sequence[str], now: float) -> str:
        """The next of ``among``."""
        self._turn += 1
        return among[self._turn % len(among)]


class LeastTokens(_Counting):
    """The replica with the fewest tokens of prompt that are not answered."""

    def choose(self, job: Job, among: Sequence[str], now: float) -> str:
        """The least busy of ``among``; among equals the one that was given least."""
        loads = self.loads
        return min(among, key=lambda r: (loads[r].tokens, loads[r].given))


class PowerOfTwo(_Counting):
    """Of two replicas drawn by lot the one with fewer requests."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        super().__init__()
        self._draw = draw

    def choose(self, job: Job, among: Sequence[str], now: float) -> str:
        """The less busy of two of ``among``."""
        n = len(among)
        if n < 2:
            return among[0]
        first = int(self._draw() * n)
        second = (first + 1 + int(self._draw() * (n - 1))) % n
        a, b = among[first], among[second]
        return a if self.loads[a].requests <= self.loads[b].requests else b


class CacheAware(_Counting):
    """The replica that will have read the prompt first: tokens it has not cached, and tokens queued there.

    ``capacity`` is how many blocks a replica's cache is taken to hold where that is not known.
    """

    def __init__(self, capacity: int = 8192) -> None:
        super().__init__()
        self.index = PrefixIndex(capacity)

    def add(self, replica: str, blocks: int = 0) -> None:
        super().add(replica, blocks)
        self.index.add(replica, blocks)

    def remove(self, replica: str) -> None:
        super().remove(replica)
        self.index.remove(replica)

    def choose(self, job: Job, among: Sequence[str], now: float) -> str:
        """The cheapest of ``among``; among equals the one that was given least."""
        loads = self.loads
        depths = self.index.depths(job.chain)
        best, cost, given = among[0], float("inf"), 0
        for replica in among:
            load = loads[replica]
            price = job.missing(depths.get(replica, 0)) + load.queued(now)
            if price < cost or (price == cost and load.given < given):
                best, cost, given = replica, price, load.given
        return best

    def dispatch(self, job: Job, replica: str, now: float) -> None:
        job.miss = job.missing(self.index.cached(replica, job.chain))
        super().dispatch(job, replica, now)
        self.index.put(replica, job.chain)


POLICIES: dict[str, Callable[[], Policy]] = {
    "cache": CacheAware,
    "least": LeastTokens,
    "p2c": PowerOfTwo,
    "round-robin": RoundRobin,
}
"""By the name that settings use."""


_LONG = 200  # characters: clients choose what they are recognised by


class Sessions:
    """Which replica a session stays with, for the ``limit`` sessions used last."""

    __slots__ = ("_kept", "_limit")

    def __init__(self, limit: int = 10000) -> None:
        self._kept: OrderedDict[str, str] = OrderedDict()
        self._limit = limit

    def __len__(self) -> int:
        return len(self._kept)

    def place(self, session: str, among: Sequence[str]) -> str:
        """The session's replica while that is one of ``among``, else a new one by rendezvous hash, kept from now on.

        The hash is the same in every process: a gateway that starts anew sends sessions where they were.
        """
        if len(session) > _LONG:
            session = blake2b(session.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        kept = self._kept.get(session)
        if kept is not None and kept in among:
            self._kept.move_to_end(session)
            return kept
        replica = rendezvous(session, among)
        self._kept[session] = replica
        self._kept.move_to_end(session)
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return replica


def rendezvous(key: str, among: Sequence[str]) -> str:
    """The one of ``among`` with the highest hash together with ``key``: when one leaves, only its keys move."""
    raw = key.encode("utf-8", "surrogatepass")
    return max(among, key=lambda name: blake2b(raw, digest_size=8, key=_key(name)).digest())


def _key(name: str) -> bytes:
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
