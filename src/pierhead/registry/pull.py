"""One blob from a registry into a sink: parallel ranges, a bounded window, order kept; decides nothing about content.

Ranges land in memory, at most ``WINDOW`` bytes ahead of what is written; the sink gets them in order, so that its
running hash and its file grow together and nothing is read twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import aiohttp

from pierhead.errors import CorruptData, SourceUnavailable
from pierhead.registry.client import Registry
from pierhead.registry.wire import Again, content_range, redact, retry_after

SEGMENT = 8 << 20
WINDOW = 64 << 20
Chunks = list[bytes]
Write = Callable[[Chunks], Awaitable[None]]


class _Whole(Exception):  # control flow: the registry sends everything whatever part it is asked for
    """Ranges do not work here."""


async def pull_blob(registry: Registry, digest: str, size: int, offset: int, write: Write, connections: int) -> None:
    """Bring bytes ``offset`` to ``size`` of a blob, in order, to ``write``; SourceUnavailable when it cannot be had."""
    if offset >= size:
        return
    transfer = _Transfer(registry, digest, size, write)
    try:
        await transfer.ranges(offset, connections)
    except BaseExceptionGroup as group:
        first = _first(group)
        if not isinstance(first, _Whole):
            raise first from first.__cause__
    else:
        return
    await transfer.whole()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One failure of those that ended the parts together."""
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found  # pyright: ignore[reportUnknownArgumentType]


class _Transfer:
    def __init__(self, registry: Registry, digest: str, size: int, write: Write) -> None:
        self._registry = registry
        self._url = registry.url("blobs", digest)
        self._size = size
        self._write = write
        self._landed = 0  # bytes that came, from anywhere: what tells progress from standing still
        self.written = 0

    # --- ranges ---------------------------------------------------------------------------------------------------

    async def ranges(self, offset: int, connections: int) -> None:
        """A few requests at a time, each for its part; written in order as soon as a part is whole."""
        self.written = offset
        parts: asyncio.Queue[asyncio.Task[Chunks]] = asyncio.Queue(max(1, WINDOW // SEGMENT - 2))
        slots = asyncio.Semaphore(max(1, connections))

        async def one(start: int, end: int) -> Chunks:
            async with slots:
                return await self._segment(start, end)

        async with asyncio.TaskGroup() as group:

            async def plan() -> None:
                for start in range(offset, self._size, SEGMENT):
                    end = min(start + SEGMENT, self._size)
                    await parts.put(group.create_task(one(start, end)))

            planner = group.create_task(plan())
            while self.written < self._size:
                chunks = await (await parts.get())
                await self._write(chunks)
                self.written += sum(map(len, chunks))
            await planner

    async def _segment(self, start: int, end: int) -> Chunks:
        """All bytes of one part; what came before a failure is kept and the rest asked for again."""
        chunks: Chunks = []
        at, idle, landed = start, 0, self._landed
        while at < end:
            try:
                at = await self._range(at, end, chunks)
            except Again as again:
                moved = self._landed > landed
                landed = self._landed
                idle = 1 if moved else idle + 1
                at = start + sum(map(len, chunks))
                if idle >= (self._registry.retry.attempts if again.connected else 3):
                    raise again.error from again.__cause__
                await self._registry.retry.pause(idle, again.after)
        return chunks

    async def _range(self, at: int, end: int, chunks: Chunks) -> int:
        headers = {"Range": f"bytes={at}-{end - 1}"}
        async with self._registry.request("GET", self._url, headers=headers, accept=(416,)) as response:
            if response.status == 200 and not (at == 0 and end == self._size):
                raise _Whole
            self._agrees(response, at, end)
            async for chunk in response.content.iter_any():
                if at + len(chunk) > end:
                    raise CorruptData(f"{redact(self._url)} sends more than it was asked for")
                chunks.append(chunk)
                at += len(chunk)
                self._landed += len(chunk)
        if at < end:
            raise Again(SourceUnavailable(f"{redact(self._url)} ended {end - at} bytes too early"))
        return at

    def _agrees(self, response: aiohttp.ClientResponse, at: int, end: int) -> None:
        where = redact(self._url)
        if response.headers.get("Content-Encoding", "identity") not in ("identity", ""):
            raise SourceUnavailable(f"{where} is sent compressed although that was not asked for")
        if response.status == 416:
            raise CorruptData(f"{where} is shorter than its manifest says")
        if response.status == 206:
            part = content_range(response.headers)
            if part is None or part[0] != at or part[1] >= end or part[2] not in (None, self._size):
                raise CorruptData(f"{where} answers with another part than it was asked for")
        elif response.content_length not in (None, self._size):
            raise CorruptData(f"{where} has {response.content_length} bytes, its manifest says {self._size}")

    # --- without ranges -------------------------------------------------------------------------------------------

    async def whole(self) -> None:
        """From the beginning, passing over what is there; every attempt has to begin anew."""
        idle, best = 0, self.written
        while self.written < self._size:
            try:
                await self._stream()
            except Again as again:
                idle = 1 if self.written > best else idle + 1
                best = max(best, self.written)
                if idle >= (self._registry.retry.attempts if again.connected else 3):
                    raise again.error from again.__cause__
                await self._registry.retry.pause(idle, again.after)

    async def _stream(self) -> None:
        skip, batch, held = self.written, list[bytes](), 0
        async with self._registry.request("GET", self._url) as response:
            if response.status != 200:
                raise Again(
                    SourceUnavailable(f"{redact(self._url)} answers {response.status}"), retry_after(response.headers)
                )
            self._agrees(response, 0, self._size)
            with contextlib.suppress(aiohttp.ClientPayloadError):  # what came is kept; the loop asks for the rest
                async for chunk in response.content.iter_any():
                    rest = chunk[skip:]
                    skip = max(0, skip - len(chunk))
                    if rest:
                        batch.append(rest)
                        held += len(rest)
                    if held >= SEGMENT:
                        await self._hand_on(batch, held)
                        batch, held = [], 0
            await self._hand_on(batch, held)
        if self.written < self._size:
            raise Again(SourceUnavailable(f"{redact(self._url)} ended after {self.written} of {self._size} bytes"))

    async def _hand_on(self, batch: Chunks, held: int) -> None:
        if self.written + held > self._size:
            raise CorruptData(f"{redact(self._url)} sends more than its manifest says")
        if batch:
            await self._write(batch)
            self.written += held
