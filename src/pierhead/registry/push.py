"""Blobs to a registry: what is there is passed over, what breaks off goes on where it stopped, even after a kill."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from io import FileIO
from pathlib import Path
from urllib.parse import urlencode, urljoin

from pierhead.errors import SourceUnavailable
from pierhead.registry.client import Registry
from pierhead.registry.uploads import Upload, Uploads
from pierhead.registry.wire import Again, persist, redact

BLOCK = 1 << 20
CHUNK = 128 << 20  # bytes of one PATCH
LEAST = 1 << 20  # below this a chunk is not too large, whatever a proxy says
REFUSED = (400, 404, 405, 411, 415, 501)  # of the first chunk: this registry takes a blob in one piece or not at all
Report = Callable[[int], None]


async def push_blob(
    registry: Registry,
    digest: str,
    path: Path,
    size: int,
    report: Report,
    mount: str = "",
    uploads: Uploads | None = None,
) -> int:
    """Upload one blob unless it is there; how many bytes of it had to be sent.

    ``mount`` is a repository of the same registry that may have it, ``uploads`` remembers what an earlier push began.
    """
    if await registry.repeat(lambda: _there(registry, digest)):
        report(size)
        return 0
    memory = uploads or Uploads(None)
    with memory.held(registry.base, registry.name.repository, digest) as upload:
        sending = _Sending(registry, digest, path, size, report, upload)
        if not await sending.resume() and not await sending.begin(mount):
            report(size)
            return 0
        await sending.run()
        return sending.sent


async def push_bytes(registry: Registry, digest: str, data: bytes) -> None:
    """Upload a small blob at once, unless it is there."""

    async def attempt() -> None:
        location, _ = await _begin(registry, digest, "")
        headers = {"Content-Type": "application/octet-stream"}
        async with registry.request("PUT", _end(location, digest), push=True, headers=headers, data=data) as answer:
            if answer.status != 201:
                raise _unfinished(location, answer.status)

    if not await registry.repeat(lambda: _there(registry, digest)):
        await registry.repeat(attempt)


async def _there(registry: Registry, digest: str) -> bool:
    async with registry.request("HEAD", registry.url("blobs", digest), missing_ok=True) as answer:
        return answer.status == 200


async def _begin(registry: Registry, digest: str, mount: str) -> tuple[str, int]:
    """Where the upload goes and how short a chunk may be; no place where the registry took the blob from ``mount``."""
    url = registry.url("blobs", "uploads/")
    if mount:
        url += "?" + urlencode({"mount": digest, "from": mount})
    async with registry.request("POST", url, push=True, data=b"") as answer:
        if answer.status == 201:
            return "", 0
        location = answer.headers.get("Location", "")
        if not location:
            raise SourceUnavailable(f"{registry.name.host} does not say where to upload to")
        least = answer.headers.get("OCI-Chunk-Min-Length", "")
        return urljoin(url, location), int(least) if least.isdecimal() else 0


def _end(location: str, digest: str) -> str:
    return f"{location}{'&' if '?' in location else '?'}{urlencode({'digest': digest})}"


def _unfinished(location: str, status: int) -> Again:
    return Again(SourceUnavailable(f"{redact(location)} answers {status} at the end of an upload"))


class _Sending:
    """One upload: its place at the registry, and how far it is."""

    def __init__(self, registry: Registry, digest: str, path: Path, size: int, report: Report, upload: Upload) -> None:
        self._registry = registry
        self._digest = digest
        self._path = path
        self._size = size
        self._report = report
        self._upload = upload
        self._location = ""
        self._at = 0
        self._chunk_size = CHUNK
        self._known = True  # whether ``_at`` is what the registry has
        self._chunked = True
        self._ended = False
        self.sent = 0

    async def resume(self) -> bool:
        """Go on with what an earlier push began; False where there is nothing, or the registry has forgotten it."""
        self._location = await asyncio.to_thread(self._upload.location)
        return bool(self._location) and await self._registry.repeat(self._ask)

    async def begin(self, mount: str = "") -> bool:
        """Begin anew; False when the registry took the blob from ``mount``."""
        self._at, self._known = 0, True
        self._location, least = await self._registry.repeat(lambda: _begin(self._registry, self._digest, mount))
        self._chunk_size = max(self._chunk_size, least)
        if self._location:
            await asyncio.to_thread(self._upload.remember, self._location)
        return bool(self._location)

    async def run(self) -> None:
        """All chunks, then the end; a failure asks the registry how far it is."""
        self._report(self._at)
        await persist(self._registry.retry, self._attempt, lambda: self._at)
        await asyncio.to_thread(self._upload.forget)

    async def _attempt(self) -> None:
        if self._ended and await _there(self._registry, self._digest):
            return  # only the answer to the end was lost
        if not self._known and not (self._chunked and await self._ask()):
            await self.begin()
        self._known = False
        while self._chunked and self._at < self._size:
            await self._chunk()
        await (self._finish() if self._chunked else self._whole())

    async def _chunk(self) -> None:
        start, end = self._at, min(self._at + self._chunk_size, self._size)
        headers = {"Content-Range": f"{start}-{end - 1}", **_body(end - start)}
        accept = (413, 416, *(REFUSED if start == 0 else ()))
        with self._path.open("rb", buffering=0) as file:
            body = self._read(file, start, end)
            async with self._registry.request(
                "PATCH", self._location, push=True, headers=headers, data=body, accept=accept
            ) as answer:
                status = answer.status
                location = answer.headers.get("Location", "")
        if status < 300:
            self._at = end
            self._location = urljoin(self._location, location) if location else self._location
            await asyncio.to_thread(self._upload.remember, self._location)
            self._report(self._at)
        elif status == 416:
            raise Again(SourceUnavailable(f"{redact(self._location)} is somewhere else than at byte {start}"), 0.0)
        elif status == 413:
            await self._smaller(end - start)
        else:
            self._chunked = False
            await self.begin()

    async def _smaller(self, length: int) -> None:
        """Something between here and the registry does not let so much pass at once."""
        if length <= LEAST:
            raise SourceUnavailable(
                f"{redact(self._location)} does not take even {length} bytes at once (413)",
                hint="Raise the limit of the proxy in front of the registry (nginx: client_max_body_size).",
            )
        self._chunk_size = max(LEAST, length // 4)
        if not await self._ask():
            await self.begin()

    async def _read(self, file: FileIO, start: int, end: int) -> AsyncGenerator[bytes]:
        """The caller closes the file: a registry that answers early leaves this generator unfinished."""
        file.seek(start)
        while start < end:
            block = await asyncio.to_thread(file.read, min(BLOCK, end - start))
            if not block:
                raise SourceUnavailable(f"the blob {self._digest[:19]} is shorter than it was")
            start += len(block)
            self.sent += len(block)
            yield block
            self._report(start)

    async def _ask(self) -> bool:
        """Learn how much the registry has; False when it has forgotten the upload."""
        async with self._registry.request("GET", self._location, push=True, accept=(400, 404, 405, 416, 501)) as answer:
            if answer.status >= 300:
                return False
            last = answer.headers.get("Range", "").removeprefix("bytes=").partition("-")[2]
            have = int(last) + 1 if last.isdecimal() and last != "0" else 0
            self._at = min(have, self._size)
            location = answer.headers.get("Location", "")
            self._location = urljoin(self._location, location) if location else self._location
        self._report(self._at)
        return True

    async def _finish(self) -> None:
        self._ended = True
        url = _end(self._location, self._digest)
        async with self._registry.request("PUT", url, push=True, data=b"", accept=(404, 416)) as answer:
            if answer.status != 201:
                raise _unfinished(self._location, answer.status)

    async def _whole(self) -> None:
        """In one piece; what fails begins anew, for such a registry cannot tell how far it is."""
        if self._at:
            await self.begin()
        self._at, self._ended = 0, True
        url = _end(self._location, self._digest)
        with self._path.open("rb", buffering=0) as file:
            body = self._read(file, 0, self._size)
            async with self._registry.request("PUT", url, push=True, headers=_body(self._size), data=body) as answer:
                if answer.status != 201:
                    raise _unfinished(self._location, answer.status)


def _body(length: int) -> dict[str, str]:
    return {"Content-Type": "application/octet-stream", "Content-Length": str(length)}
