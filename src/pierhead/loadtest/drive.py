"""The load generator: closed loops and open loops over one event loop, which never end by a server's failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter

from pierhead.loadtest.answer import Answer
from pierhead.loadtest.client import Pool
from pierhead.loadtest.plan import STREAMED, Load, Plan, arrivals

PATHS = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
    "rerank": "/rerank",
}
_PAUSE = (0.05, 1.0)  # seconds after a failure: a server that refuses is not asked as fast as it can refuse
_DOUBLINGS = 5  # of that, from the first to the last


@dataclass
class Pass:
    """What one pass measured: every answer, how long it took, and how busy and late the generator itself was."""

    load: Load
    round: int
    answers: list[Answer] = field(default_factory=list[Answer])
    seconds: float = 0.0
    cpu: float = 0.0
    late: list[float] = field(default_factory=list[float])
    failed: int = 0
    tokens: int = 0

    def add(self, answer: Answer) -> None:
        """One more answer, or failure."""
        self.answers.append(answer)
        self.failed += bool(answer.error)
        self.tokens += answer.output_tokens


@dataclass(frozen=True)
class Seen:
    """How far a test is: ``share`` of pass ``number`` of ``total`` is over."""

    number: int
    total: int
    load: Load
    round: int
    share: float
    done: int
    failed: int
    tokens: int


Watch = Callable[[Seen], None]
_TICK = 0.2


def pause(failures: int) -> float:
    """Seconds that a client waits after so many failures in a row."""
    return min(_PAUSE[0] * 2 ** min(failures, _DOUBLINGS), _PAUSE[1]) if failures else 0.0


class Driver:
    """Runs the passes of a plan against one target."""

    def __init__(self, pool: Pool, plan: Plan, task: str, bodies: Iterator[bytes], watch: Watch) -> None:
        self._pool = pool
        self._plan = plan
        self._streamed = task in STREAMED
        self._path = PATHS[task]
        self._bodies = bodies
        self._watch = watch

    async def warm_up(self) -> list[Answer]:
        """Requests that do not count, all at once."""
        now = perf_counter()
        asks = (self._ask(now) for _ in range(self._plan.warm_up))
        return list(await asyncio.gather(*asks))

    async def run(self) -> list[Pass]:
        """Every pass, one after the other."""
        done: list[Pass] = []
        for number, (turn, load) in enumerate(self._plan.passes):
            measured = Pass(load, turn)
            watcher = asyncio.create_task(self._tell(number, measured))
            began, cpu = perf_counter(), time.process_time()
            try:
                await (self._open(measured) if load.rate else self._closed(measured))
            finally:
                watcher.cancel()
            ends = [a.ended for a in measured.answers]
            measured.seconds = max(ends, default=perf_counter()) - began
            measured.cpu = (time.process_time() - cpu) / max(perf_counter() - began, 1e-9)
            done.append(measured)
            self._say(number, measured, 1.0)
        return done

    async def _closed(self, measured: Pass) -> None:
        """So many clients, each of which sends its next request when it has its answer."""
        plan, until = self._plan, perf_counter() + self._plan.seconds
        left = plan.requests or 1 << 62

        async def client() -> None:
            nonlocal left
            failures = 0
            while left > 0 and (plan.requests or perf_counter() < until):
                left -= 1
                answer = await self._ask(perf_counter())
                measured.add(answer)
                failures = failures + 1 if answer.error else 0
                if failures:
                    await asyncio.sleep(pause(failures))

        async with asyncio.TaskGroup() as group:
            for _ in range(measured.load.concurrency):
                group.create_task(client())

    async def _open(self, measured: Pass) -> None:
        """Arrivals as they were planned, whether or not the server keeps up; each is timed from when it was due."""
        plan, began = self._plan, perf_counter()
        room = asyncio.Semaphore(plan.most)
        seed = plan.seed + 1000 * (measured.round + 1)

        async def arrive(due: float) -> None:
            measured.late.append(perf_counter() - due)
            left = due + plan.timeout - perf_counter()
            try:
                async with asyncio.timeout(left):
                    await room.acquire()
            except TimeoutError:
                lost = Answer(self._streamed, due)
                lost.fail("timeout", f"no connection was free within {plan.timeout:g} s")
                measured.add(lost)
                return
            try:
                measured.add(await self._ask(due))
            finally:
                room.release()

        async with asyncio.TaskGroup() as group:
            for at in arrivals(measured.load.rate, seed, seconds=plan.seconds, count=plan.requests):
                wait = began + at - perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                group.create_task(arrive(began + at))

    async def _ask(self, due: float) -> Answer:
        answer = Answer(self._streamed, due)
        request = self._pool.target.request("POST", self._path, next(self._bodies))
        await self._pool.ask(request, answer, max(0.001, due + self._plan.timeout - perf_counter()))
        answer.forget()
        return answer

    async def _tell(self, number: int, measured: Pass) -> None:
        """Progress, a few times a second."""
        began = perf_counter()
        while True:
            await asyncio.sleep(_TICK)
            plan = self._plan
            share = len(measured.answers) / plan.requests if plan.requests else (perf_counter() - began) / plan.seconds
            self._say(number, measured, min(share, 0.99))

    def _say(self, number: int, measured: Pass, share: float) -> None:
        total, done = len(self._plan.passes), len(measured.answers)
        self._watch(Seen(number, total, measured.load, measured.round, share, done, measured.failed, measured.tokens))
