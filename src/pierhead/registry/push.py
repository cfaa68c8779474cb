"""Blobs and a manifest to a registry: what is there is passed over, what breaks off goes on where it stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from urllib.parse import urlencode, urljoin

from pierhead.errors import SourceUnavailable
from pierhead.registry.client import Registry
from pierhead.registry.wire import Again, redact

BLOCK = 1 << 20
CHUNK = 256 << 20  # bytes of one PATCH
Report = Callable[[int], None]


async def push_blob(registry: Registry, digest: str, path: Path, size: int, report: Report, mount: str = "") -> bool:
    """Upload one blob unless it is there; False when nothing had to be sent.

    ``mount`` is a repository of the same registry that may have it.
    """
    if await registry.repeat(lambda: _there(registry, digest)):
        report(size)
        return False
    location = await registry.repeat(lambda: _begin(registry, digest, mount))
    if not location:
        report(size)
        return False
    await _Upload(registry, digest, path, size, report, location).run()
    return True


async def push_bytes(registry: Registry, digest: str, data: bytes) -> None:
    """Upload a small blob at once, unless it is there."""

    async def attempt() -> None:
        location = await _begin(registry, digest, "")
        url = f"{location}{'&' if '?' in location else '?'}{urlencode({'digest': digest})}"
        headers = {"Content-Type": "application/octet-stream"}
        async with registry.request("PUT", url, push=True, headers=headers, data=data) as answer:
            if answer.status != 201:
                raise Again(SourceUnavailable(f"{redact(url)} answers {answer.status} at the end of an upload"))

    if not await registry.repeat(lambda: _there(registry, digest)):
        await registry.repeat(attempt)


async def _there(registry: Registry, digest: str) -> bool:
    async with registry.request("HEAD", registry.url("blobs", digest), missing_ok=True) as answer:
        return answer.status == 200


async def _begin(registry: Registry, digest: str, mount: str) -> str:
    """Where the upload goes; empty when the registry took the blob from another repository."""
    url = registry.url("blobs", "uploads/")
    if mount:
        url += "?" + urlencode({"mount": digest, "from": mount})
    async with registry.request("POST", url, push=True, data=b"") as answer:
        if answer.status == 201:
            return ""
        location = answer.headers.get("Location", "")
        if not location:
            raise SourceUnavailable(f"{registry.name.host} does not say where to upload to")
        return urljoin(url, location)


class _Upload:
    def __init__(self, registry: Registry, digest: str, path: Path, size: int, report: Report, location: str) -> None:
        self._registry = registry
        self._digest = digest
        self._path = path
        self._size = size
        self._report = report
        self._location = location
        self._at = 0

    async def run(self) -> None:
        """All chunks, then the end; a failure asks the registry how far it is."""
        idle, best = 0, 0
        while True:
            try:
                while self._at < self._size:
                    await self._chunk()
                await self._finish()
                return
            except Again as again:
                idle = 1 if self._at > best else idle + 1
                best = max(best, self._at)
                if idle >= (self._registry.retry.attempts if again.connected else 3):
                    raise again.error from again.__cause__
                await self._registry.retry.pause(idle, again.after)
            await self._registry.repeat(self._ask)

    async def _chunk(self) -> None:
        end = min(self._at + CHUNK, self._size)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{self._at}-{end - 1}",
            "Content-Length": str(end - self._at),
        }
        body = self._read(self._at, end)
        async with self._registry.request("PATCH", self._location, push=True, headers=headers, data=body) as answer:
            self._move(answer.headers.get("Location", ""))
            self._at = end
        self._report(self._at)

    async def _read(self, start: int, end: int) -> AsyncGenerator[bytes]:
        with self._path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end:
                block = await asyncio.to_thread(file.read, min(BLOCK, end - start))
                if not block:
                    raise SourceUnavailable(f"the blob {self._digest[:19]} is shorter than it was")
                start += len(block)
                yield block
                self._report(start)

    def _move(self, location: str) -> None:
        if location:
            self._location = urljoin(self._location, location)

    async def _ask(self) -> None:
        """How much the registry has; a new upload when it has forgotten this one."""
        async with self._registry.request("GET", self._location, push=True, missing_ok=True) as answer:
            if answer.status != 404:
                last = answer.headers.get("Range", "").removeprefix("bytes=").partition("-")[2]
                have = int(last) + 1 if last.isdigit() and last != "0" else 0
                self._at = min(have, self._size)
                self._move(answer.headers.get("Location", ""))
                return
        self._location = await _begin(self._registry, self._digest, "")
        self._at = 0

    async def _finish(self) -> None:
        mark = "&" if "?" in self._location else "?"
        url = f"{self._location}{mark}{urlencode({'digest': self._digest})}"
        async with self._registry.request("PUT", url, push=True, data=b"") as answer:
            if answer.status != 201:
                raise Again(SourceUnavailable(f"{redact(url)} answers {answer.status} at the end of an upload"))
