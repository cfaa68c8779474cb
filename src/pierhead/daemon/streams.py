"""Answers that go on for a while: events of work as NDJSON, log lines, readings; holds no state of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from pierhead.daemon.wire import ReplicaStats, StatsLine
from pierhead.errors import PierError
from pierhead.events import AnyEvent, Failed, Listener, PullDone, PullProgress, Ready, encode
from pierhead.fleet.replica import Replica
from pierhead.runtimes.base import Stats

log = logging.getLogger(__name__)
_BACKLOG = 1000


async def events(work: Callable[[Listener], Awaitable[object]]) -> AsyncIterator[bytes]:
    """``happenings`` as lines."""
    async with contextlib.aclosing(happenings(work)) as told:
        async for event in told:
            yield encode(event) + b"\n"


async def happenings(work: Callable[[Listener], Awaitable[object]]) -> AsyncGenerator[AnyEvent]:
    """Run ``work`` and yield the events it tells its listener; the last is its own or ``failed``.

    Progress is dropped while the reader lags; when the reader leaves, the work is cancelled. The listener may be
    called from any thread.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[AnyEvent | None] = asyncio.Queue()

    def listen(event: AnyEvent) -> None:
        if not (isinstance(event, PullProgress) and queue.qsize() > _BACKLOG):
            loop.call_soon_threadsafe(queue.put_nowait, event)

    async def run() -> None:
        try:
            await work(listen)
        except PierError as exc:
            listen(Failed(error=exc.to_dict()))
        except Exception as exc:  # the reader must learn of a bug, too
            log.exception("work of the control API")
            listen(Failed(error=PierError(f"internal error: {exc!r}").to_dict()))
        finally:
            loop.call_soon(queue.put_nowait, None)

    task = asyncio.create_task(run())
    try:
        while (event := await queue.get()) is not None:
            yield event
            if isinstance(event, (Failed, Ready, PullDone)):
                break
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def log_lines(replica: Replica, tail: int | None, follow: bool) -> AsyncIterator[bytes]:
    """The engine's log lines; of a program that has ended, the last ones that were kept, before those of the next."""
    instance = replica.instance
    error = replica.ended if instance is not None else replica.status.error
    kept: list[Any] = [*error.data.get("log", [])] if error is not None else []
    if instance is not None and error is not None:
        kept.append(f"pierhead: {error.message}; started again")
    left = tail
    if instance is not None and kept and tail is not None:
        left = tail - sum([1 async for _ in instance.logs(tail=tail)])
    for line in kept if left is None else kept[max(0, len(kept) - max(0, left)) :]:
        yield str(line).encode() + b"\n"
    if instance is None:
        return
    async for line in instance.logs(tail=tail, follow=follow):
        yield line.rstrip(b"\n") + b"\n"


async def stats_lines(replicas: Callable[[], list[Replica]], interval: float, once: bool) -> AsyncIterator[bytes]:
    """Readings every ``interval`` seconds; with ``once`` a single line, made of two readings a little apart."""
    before: dict[str, Stats] = {}
    if once:
        before = {r.id: s for r, s in await _read(replicas())}
        interval = min(interval, 0.25)
        await asyncio.sleep(interval)
    while True:
        began = time.monotonic()
        readings = await _read(replicas())
        line = StatsLine([_reading(r, s, before.get(r.id)) for r, s in readings])
        yield msgspec.json.encode(line) + b"\n"
        if once:
            return
        before = {r.id: s for r, s in readings}
        await asyncio.sleep(max(0.0, interval - (time.monotonic() - began)))


async def _read(replicas: list[Replica]) -> list[tuple[Replica, Stats]]:
    found: list[tuple[Replica, Stats]] = []
    for replica in replicas:
        instance = replica.instance
        if instance is not None:
            with contextlib.suppress(PierError, OSError):
                found.append((replica, await instance.stats()))
    return found


def _reading(replica: Replica, now: Stats, before: Stats | None) -> ReplicaStats:
    percent = 0.0
    if before is not None and now.at > before.at:
        percent = max(0.0, 100.0 * (now.cpu_seconds - before.cpu_seconds) / (now.at - before.at))
    return ReplicaStats(
        id=replica.id, model=replica.life.model.name, cpu_percent=round(percent, 1), **msgspec.structs.asdict(now)
    )
