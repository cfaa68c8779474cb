"""Dynamic batching: what waits is put together by length and run in worker threads; knows no model.

A request that finds the model idle runs at once. While it is busy, requests gather; the next batch takes the oldest and
those that are most like it, so that little is padded. With ``delay`` a batch that could be larger waits up to so long,
but only when the one before had company: a lone client never pays for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .faults import Refused, full
from .metrics import Metrics

WASTE = 0.3  # of a batch's tokens that may be padding
WINDOW = 8  # times the largest batch: how many of those that wait are looked at


class Job:
    """One request: its parts may run in several batches; ``future`` has all results in order.

    ``check`` is called with each result, and refuses the whole request.
    """

    __slots__ = ("check", "future", "gone", "left", "results")

    def __init__(
        self,
        parts: int,
        future: asyncio.Future[list[Any]],
        gone: Callable[[], bool],
        check: Callable[[Any], None] | None,
    ) -> None:
        self.check = check
        self.future = future
        self.left = parts
        self.results: list[Any] = [None] * parts
        self.gone = gone

    @property
    def dropped(self) -> bool:
        """Whether nobody wants its results any more."""
        return self.future.done() or self.gone()


@dataclass(slots=True, eq=False)
class Item:
    """A part of a request: ``length`` in tokens, ``rows`` of a batch; only items with the same ``key`` fit together."""

    work: Any
    length: int = 1
    rows: int = 1
    key: Hashable = None
    job: Job | None = None
    place: int = 0
    since: float = 0.0


class Batcher:
    """Gives batches to ``run`` (called in a thread; it returns one result per item)."""

    def __init__(
        self,
        run: Callable[[list[Item]], list[Any]],
        *,
        metrics: Metrics,
        max_batch: int,
        max_tokens: int,
        delay: float,
        queue: int,
        workers: int,
    ) -> None:
        self._run = run
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_tokens = max_tokens
        self._delay = delay
        self._limit = queue
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, "batch")
        self._waiting: list[Item] = []
        self._busy = 0
        self._company = False
        self._scheduled: asyncio.TimerHandle | asyncio.Handle | None = None

    async def submit(
        self, items: list[Item], gone: Callable[[], bool], check: Callable[[Any], None] | None = None
    ) -> list[Any]:
        """The results of these items; Refused 429 when too many wait already."""
        waiting = len(self._waiting)
        if waiting and waiting + len(items) > self._limit:
            raise full(f"{waiting} texts or tensors wait already, which is as many as may ({self._limit})")
        loop = asyncio.get_running_loop()
        job = Job(len(items), loop.create_future(), gone, check)
        now = time.monotonic()
        for place, item in enumerate(items):
            item.job, item.place, item.since = job, place, now
        self._waiting += items
        self._metrics.waiting = len(self._waiting)
        if self._scheduled is None and self._busy < self._workers:
            self._scheduled = loop.call_soon(self._dispatch)  # what arrives in the same moment goes along
        return await job.future

    def close(self) -> None:
        """Refuse what waits."""
        for item in self._waiting:
            if item.job is not None and not item.job.future.done():
                item.job.future.set_exception(Refused(503, "the server is ending", "unavailable"))
        self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- choosing -------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        self._scheduled = None
        while self._waiting and self._busy < self._workers:
            if pause := self._pause():
                self._scheduled = asyncio.get_running_loop().call_later(pause, self._dispatch)
                return
            batch = self._take()
            if batch:
                self._start(batch)
        self._metrics.waiting = len(self._waiting)

    def _pause(self) -> float:
        """Seconds that the oldest may still wait for company."""
        if not self._delay or not self._company or len(self._waiting) >= self._max_batch:
            return 0.0
        return max(0.0, self._waiting[0].since + self._delay - time.monotonic())

    def _take(self) -> list[Item]:
        """The next batch: the oldest item and its likes; empty when nobody wants what is there."""
        window = self._waiting[: self._max_batch * WINDOW]
        wanted = [item for item in window if item.job is not None and not item.job.dropped]
        if len(wanted) < len(window):
            kept = set(map(id, wanted))
            self._waiting = [i for i in window if id(i) in kept] + self._waiting[len(window) :]
            if not wanted:
                return []
        batch = choose(wanted, self._max_batch, self._max_tokens)
        if len(batch) == len(self._waiting):
            self._waiting = []
        else:
            chosen = set(map(id, batch))
            self._waiting = [item for item in self._waiting if id(item) not in chosen]
        return batch

    # --- running --------------------------------------------------------------------------------------------------

    def _start(self, batch: list[Item]) -> None:
        self._busy += 1
        self._metrics.running += len(batch)
        self._metrics.batches.add(sum(item.rows for item in batch))
        now = time.monotonic()
        for item in batch:
            self._metrics.queued.add(now - item.since)
        loop = asyncio.get_running_loop()
        self._pool.submit(self._work, loop, batch)

    def _work(self, loop: asyncio.AbstractEventLoop, batch: list[Item]) -> None:
        """In a thread: results, or for each item its own failure, as one bad tensor must not spoil the others."""
        try:
            results = self._run(batch)
        except Exception as exc:  # the engine's own words go to whoever asked
            results = [exc] if len(batch) == 1 else [self._alone(item) for item in batch]
        loop.call_soon_threadsafe(self._done, batch, results)

    def _alone(self, item: Item) -> Any:
        try:
            return self._run([item])[0]
        except Exception as exc:
            return exc

    def _done(self, batch: list[Item], results: list[Any]) -> None:
        self._busy -= 1
        self._company = len(batch) > 1
        self._metrics.running -= len(batch)
        for item, result in zip(batch, results, strict=True):
            settle(item, result)
        if self._waiting and self._scheduled is None:
            self._dispatch()


def settle(item: Item, result: Any) -> None:
    """Hand a result to its request."""
    job = item.job
    if job is None or job.future.done():
        return
    if job.check is not None and not isinstance(result, Exception):
        try:
            job.check(result)
        except Refused as refused:
            result = refused
    if isinstance(result, Exception):
        job.results.clear()
        job.future.set_exception(result)
        return
    job.results[item.place] = result
    job.left -= 1
    if not job.left:
        job.future.set_result(job.results)


def choose(waiting: list[Item], max_batch: int, max_tokens: int) -> list[Item]:
    """The oldest item with those of its key that are closest in length, within the bounds on rows and tokens."""
    oldest = waiting[0]
    fitting = [item for item in waiting if item.key == oldest.key]
    if len(fitting) == 1:
        return fitting
    fitting.sort(key=lambda item: item.length)
    low = high = next(i for i, item in enumerate(fitting) if item is oldest)
    rows, tokens = oldest.rows, oldest.length * oldest.rows
    while True:
        grown = _step(fitting, low, high)
        if grown is None:
            break
        item = fitting[grown]
        longest = max(item.length, fitting[high].length)
        more_rows, more = rows + item.rows, tokens + item.length * item.rows
        if more_rows > max_batch or longest * more_rows > max_tokens or more < longest * more_rows * (1 - WASTE):
            break
        low, high, rows, tokens = min(low, grown), max(high, grown), more_rows, more
    return fitting[low : high + 1]


def _step(items: list[Item], low: int, high: int) -> int | None:
    """The neighbour of ``items[low:high + 1]`` that is closest in length."""
    if low == 0:
        return high + 1 if high + 1 < len(items) else None
    if high + 1 == len(items):
        return low - 1
    below, above = items[low].length - items[low - 1].length, items[high + 1].length - items[high].length
    return high + 1 if above <= below else low - 1
