"""Where a file lands: a store ingest seen as an async sink that reports progress, and waits for other pulls' locks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from pierhead.events import Listener, PullProgress
from pierhead.sources.base import RemoteFile
from pierhead.sources.threads import entered, finished
from pierhead.store.blobs import Ingest
from pierhead.store.layout import Store
from pierhead.store.model import Blob

REPORT_EVERY = 0.1
WATCH_EVERY = 0.25


class Progress:
    """Tells a listener how far one file is, ten times a second at most."""

    def __init__(self, listener: Listener, name: str, file: str, total: int | None, digest: str = "") -> None:
        self._listener = listener
        self._name = name
        self._file = file
        self._digest = digest
        self._total = total or 0
        self._last = 0.0
        self._pending = -1
        self.resumed = 0

    def at(self, done: int, *, force: bool = False) -> None:
        """``done`` bytes are there now."""
        now = time.monotonic()
        self._pending = done
        if force or now - self._last >= REPORT_EVERY:
            self._last = now
            self._pending = -1
            total = max(self._total, done) if self._total else 0
            self._listener(
                PullProgress(
                    name=self._name,
                    file=self._file,
                    done=done,
                    total=total,
                    resumed=self.resumed,
                    digest=self._digest,
                )
            )

    async def keep_up(self) -> None:
        """Tell what was held back, until cancelled: a stalled transfer shows all that came."""
        while True:
            await asyncio.sleep(WATCH_EVERY)
            if self._pending >= 0:
                self.at(self._pending, force=True)


class Landing:
    """A sink into one ingest; after ``restart`` it is another ingest of the same key."""

    def __init__(self, store: Store, file: RemoteFile, progress: Progress) -> None:
        self._store = store
        self._file = file
        self._progress = progress
        self._ingest = self._make(None)

    def _make(self, waiting: Callable[[Path], None] | None) -> Ingest:
        file = self._file
        return self._store.ingest(file.key, size=file.size, digest=file.digest or None, waiting=waiting)

    @property
    def offset(self) -> int:
        return self._ingest.offset

    @property
    def digest(self) -> str:
        """Of what has landed so far."""
        return self._ingest.done.digest if self._ingest.done else self._ingest.digest

    @property
    def done(self) -> Blob | None:
        """The blob, where another pull brought it while this one waited."""
        return self._ingest.done

    async def open(self) -> None:
        """Wait until no other pull has it, and show that one's progress meanwhile."""
        loop = asyncio.get_running_loop()
        watch = asyncio.Event()
        parts: list[Path] = []

        def waiting(part: Path) -> None:
            parts.append(part)
            loop.call_soon_threadsafe(watch.set)

        watcher = asyncio.create_task(_watch(watch, parts, self._progress))
        self._ingest = self._make(waiting)
        try:
            await entered(self._ingest)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        self._progress.resumed = self._ingest.resumed
        self._progress.at(self._ingest.offset, force=True)

    async def close(self) -> None:
        """Let others have it; what landed stays for a later pull."""
        if self._ingest.done is None and self._ingest.offset == 0:
            await self.abort()
        await finished(self._ingest.__exit__, None, None, None)

    async def write(self, data: bytes) -> None:
        await finished(self._ingest.write, data)
        self._progress.at(self._ingest.offset)

    async def write_all(self, chunks: list[bytes]) -> None:
        """Several pieces in one go of a thread."""
        await finished(self._write_all, chunks)
        self._progress.at(self._ingest.offset)

    def _write_all(self, chunks: list[bytes]) -> None:
        for chunk in chunks:
            self._ingest.write(chunk)

    def write_now(self, data: bytes) -> None:
        """``write`` for a caller that is in a thread already."""
        self._ingest.write(data)

    def report(self) -> None:
        self._progress.at(self._ingest.offset)

    async def restart(self) -> None:
        await finished(self._ingest.abort)
        await self.close()
        await self.open()

    async def checkpoint(self) -> None:
        await finished(self._ingest.checkpoint)

    @property
    def part(self) -> Path:
        """The file that grows until ``commit``."""
        return self._ingest.part

    async def abort(self) -> None:
        """Keep nothing of it."""
        await finished(self._ingest.abort)

    async def commit(self) -> Blob:
        blob = await finished(self._ingest.commit)
        self._progress.at(blob.size, force=True)
        return blob


@contextlib.asynccontextmanager
async def landing(store: Store, file: RemoteFile, progress: Progress) -> AsyncGenerator[Landing]:
    """The sink for one planned file, held by this pull alone; while another pull has it, its progress is shown."""
    sink = Landing(store, file, progress)
    await sink.open()
    ticker = asyncio.create_task(progress.keep_up())
    try:
        yield sink
    finally:
        ticker.cancel()
        await sink.close()


async def _watch(begin: asyncio.Event, parts: list[Path], progress: Progress) -> None:
    """Show how the partial file of another pull grows, until cancelled."""
    await begin.wait()
    while True:
        with contextlib.suppress(FileNotFoundError):
            progress.at(os.stat(parts[0]).st_size)
        await asyncio.sleep(WATCH_EVERY)  # the other process sends no events: its file's size is all there is
