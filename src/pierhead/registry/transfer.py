"""One file into a sink: parallel ranges, a bounded window, order kept; knows no registry and decides nothing.

Ranges land in memory, at most ``WINDOW`` bytes ahead of what is written; the sink gets them in order, so that its
running hash and its file grow together and nothing is read twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import aiohttp

from pierhead.errors import CorruptData, SourceUnavailable
from pierhead.registry.client import Registry
from pierhead.registry.wire import Again, Retry, content_range, persist, redact, retry_after

SEGMENT = 16 << 20
WINDOW = 64 << 20
LEAST = 64 << 10  # bytes that an answer has to bring within ``patience``, lest it be called a trickle
FLUSH = 1 << 20  # what is written at once while a part still grows
Chunks = list[bytes]
Write = Callable[[Chunks], Awaitable[None]]  # ends what it began, even when its caller is cancelled
Ask = Callable[[Mapping[str, str]], AbstractAsyncContextManager[aiohttp.ClientResponse]]


class _Whole(Exception):  # control flow: the server sends everything whatever part it is asked for
    """Ranges do not work here."""


class Changed(Exception):  # tells the caller to begin again
    """The file behind the address is another one than before."""


@dataclass(frozen=True)
class Origin:
    """Where a file comes from: ``ask`` makes one request with these headers, Again for what may pass.

    ``size`` is None where nobody knows it. ``exact`` bytes are checked against a digest afterwards; without one,
    ``validator`` (a strong ETag or a date) keeps parts of different files apart, and a file without either is read in
    one go. An answer that brings next to nothing for ``patience`` seconds is dropped and asked for again. ``where`` and
    ``told`` are for messages.
    """

    ask: Ask
    where: str
    size: int | None
    retry: Retry
    exact: bool = True
    validator: str = ""
    ranges: bool = True
    told: str = "its manifest says"
    patience: float = 60.0


async def pull_blob(registry: Registry, digest: str, size: int, offset: int, write: Write, connections: int) -> None:
    """Bring bytes ``offset`` to ``size`` of a blob, in order, to ``write``; SourceUnavailable when it cannot be had."""
    url = registry.url("blobs", digest)

    def ask(headers: Mapping[str, str]) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return registry.request("GET", url, headers=headers, accept=(416,))

    await transfer(
        Origin(ask, redact(url), size, registry.retry, patience=registry.patience), offset, write, connections
    )


async def transfer(origin: Origin, offset: int, write: Write, connections: int) -> None:
    """Bring the bytes from ``offset`` on, in order, to ``write``.

    Raises CorruptData where the server contradicts itself, SourceUnavailable when it gives up, and Changed when the
    bytes before ``offset`` are those of another file.
    """
    if origin.size is not None and offset >= origin.size:
        return
    moving = _Transfer(origin, write, offset)
    if origin.ranges and origin.size is not None and (origin.exact or origin.validator):
        try:
            await moving.parallel(origin.size, connections)
        except BaseExceptionGroup as group:
            first = _first(group)
            await moving.keep()
            if not isinstance(first, _Whole):
                raise first from first.__cause__
        else:
            return
    await moving.whole()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One failure of those that ended the parts together."""
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found  # pyright: ignore[reportUnknownArgumentType]


class _Segment:
    """One part on its way: what came and nobody took yet."""

    def __init__(self, start: int, end: int) -> None:
        self.at = start
        self.end = end
        self.grew = asyncio.Event()
        self._held: Chunks = []
        self._bytes = 0

    def add(self, chunk: bytes) -> None:
        self._held.append(chunk)
        self._bytes += len(chunk)
        self.at += len(chunk)
        if self._bytes >= FLUSH or self.at == self.end:
            self.grew.set()

    async def take(self) -> Chunks:
        """What came, as soon as it is worth a write."""
        await self.grew.wait()
        return self.rest()

    def rest(self) -> Chunks:
        """What came, however little."""
        self.grew.clear()
        held, self._held, self._bytes = self._held, [], 0
        return held


class _Transfer:
    def __init__(self, origin: Origin, write: Write, offset: int) -> None:
        self._from = origin
        self._write = write
        self._validator = origin.validator
        self._landed = 0  # bytes that came, from anywhere: what tells progress from standing still
        self._first = _Segment(offset, offset)  # the part that is written now
        self._torn = False  # a write failed: what comes after it has no place
        self.written = offset

    # --- ranges ---------------------------------------------------------------------------------------------------

    async def parallel(self, size: int, connections: int) -> None:
        """A few requests at a time, each for its part; the first of them is written while it comes."""
        parts: asyncio.Queue[_Segment] = asyncio.Queue(max(1, WINDOW // SEGMENT - 2))
        slots = asyncio.Semaphore(max(1, connections))

        async def one(part: _Segment) -> None:
            async with slots:
                await self._segment(part)

        async with asyncio.TaskGroup() as group:

            async def plan(offset: int) -> None:
                for start in range(offset, size, SEGMENT):
                    part = _Segment(start, min(start + SEGMENT, size))
                    await parts.put(part)
                    group.create_task(one(part))

            planner = group.create_task(plan(self.written))
            while self.written < size:
                self._first = await parts.get()
                while self.written < self._first.end:
                    await self._put(await self._first.take())
            await planner

    async def keep(self) -> None:
        """Write what came of the first part before the others failed; not after a write that failed itself."""
        if not self._torn:
            await self._put(self._first.rest())

    async def _put(self, chunks: Chunks) -> None:
        self.written += sum(map(len, chunks))  # before the write: a cancelled caller does not see its end
        if not chunks:
            return
        self._torn = True
        try:
            await self._write(chunks)
        except asyncio.CancelledError:
            self._torn = False
            raise
        self._torn = False

    async def _segment(self, part: _Segment) -> None:
        """All bytes of one part; what came before a failure is kept and the rest asked for again."""

        async def attempt() -> None:
            while part.at < part.end:  # a server may answer with less than was asked for
                await self._range(part)

        await persist(self._from.retry, attempt, lambda: self._landed)

    async def _range(self, part: _Segment) -> None:
        start, size = part.at, self._from.size
        async with self._from.ask(self._headers(start, part.end)) as response:
            if response.status == 200 and not (start == 0 and part.end == size and self._same(response)):
                raise _Whole
            self._agrees(response, start, part.end)
            given = content_range(response.headers)
            end = given[1] + 1 if given else part.end
            async for chunk in self._body(response):
                if part.at + len(chunk) > end:
                    raise CorruptData(f"{self._from.where} sends more than it was asked for")
                part.add(chunk)
                self._landed += len(chunk)
        if part.at < end:
            raise Again(SourceUnavailable(f"{self._from.where} ended {end - part.at} bytes too early"))

    async def _body(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes]:
        """The body as it comes; Again when next to nothing comes, though the connection lives."""
        loop, came = asyncio.get_running_loop(), 0
        since = loop.time()
        async for chunk in response.content.iter_any():
            came += len(chunk)
            if came >= LEAST:
                came, since = 0, loop.time()
            elif loop.time() - since > self._from.patience:
                error = SourceUnavailable(f"{self._from.where} is sent too slowly", hint="Try again later.")
                raise Again(error, 0.0, slow=True)
            before = loop.time()
            yield chunk
            since += loop.time() - before  # a slow disk is not the server's fault

    def _headers(self, start: int, end: int | None) -> dict[str, str]:
        if not start and end is None:
            return {}
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        if self._validator and not self._from.exact:
            headers["If-Range"] = self._validator
        return headers

    def _same(self, response: aiohttp.ClientResponse) -> bool:
        """Whether a whole body is of the file that was begun."""
        return self._from.exact or (bool(self._validator) and validator_of(response) == self._validator)

    def _agrees(self, response: aiohttp.ClientResponse, start: int, end: int | None) -> None:
        where, size = self._from.where, self._from.size
        if response.headers.get("Content-Encoding", "identity") not in ("identity", ""):
            raise SourceUnavailable(f"{where} is sent compressed although that was not asked for")
        if response.status == 416:
            if not self._from.exact:
                raise Changed
            raise CorruptData(f"{where} is shorter than {self._from.told}")
        if response.status == 206:
            part = content_range(response.headers)
            if part is None or not _fits(part, start, end, size):
                raise CorruptData(f"{where} answers with another part than it was asked for")
        elif response.status != 200:
            raise Again(SourceUnavailable(f"{where} answers {response.status}"), retry_after(response.headers))
        elif size is not None and response.content_length not in (None, size):
            raise CorruptData(f"{where} has {response.content_length} bytes, {self._from.told} {size}")

    # --- without ranges -------------------------------------------------------------------------------------------

    async def whole(self) -> None:
        """One request to the end; where the server begins anew, what is there already is passed over."""
        await persist(self._from.retry, self._stream, lambda: self.written)

    async def _stream(self) -> None:
        size = self._from.size
        async with self._from.ask(self._headers(self.written, None)) as response:
            self._agrees(response, self.written, None)
            skip = self.written if response.status == 200 else 0
            if not self.written:
                self._validator = validator_of(response)
            elif skip and not self._same(response):
                raise Changed
            await self._pour(response, skip)
        if size is not None and self.written < size:
            raise Again(SourceUnavailable(f"{self._from.where} ended after {self.written} of {size} bytes"))

    async def _pour(self, response: aiohttp.ClientResponse, skip: int) -> None:
        """The body, in batches; what came before an error is kept."""
        batch, held = list[bytes](), 0
        try:
            async for chunk in self._body(response):
                rest = chunk[skip:]
                skip = max(0, skip - len(chunk))
                if rest:
                    batch.append(rest)
                    held += len(rest)
                if held >= FLUSH:
                    full, batch, held = batch, [], 0
                    await self._hand_on(full)
        except (aiohttp.ClientError, TimeoutError, OSError, Again):
            await self._hand_on(batch)
            raise
        await self._hand_on(batch)

    async def _hand_on(self, batch: Chunks) -> None:
        if self._from.size is not None and self.written + sum(map(len, batch)) > self._from.size:
            raise CorruptData(f"{self._from.where} sends more than {self._from.told}")
        await self._put(batch)


def _fits(part: tuple[int, int, int | None], start: int, end: int | None, size: int | None) -> bool:
    """Whether an answer is of the part that was asked for, or honestly of a smaller one."""
    first, last, total = part
    return first == start and first <= last and (not end or last < end) and (not size or total in (None, size))


def validator_of(response: aiohttp.ClientResponse) -> str:
    """What ``If-Range`` may carry: a strong ETag, else the date of the last change."""
    etag = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified", "") if not etag else ""
