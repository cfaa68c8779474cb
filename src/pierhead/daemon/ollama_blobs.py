"""Files that Ollama's clients send before they make a model of them: into the store as they arrive, checked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pierhead.daemon.ollama_progress import answer
from pierhead.daemon.parts import Parts
from pierhead.errors import NotFound, PierError, UsageError
from pierhead.sources.threads import entered, finished
from pierhead.store.blobs import DIGEST, Ingest

_PIECE = 1 << 20
_SKIM = 1 << 20
_KEPT = 3600.0  # seconds that a file waits for the model it is for; then a clean-up may take it


class Arrivals:
    """Takes blobs in, and keeps the collector from what came lately."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._lease = contextlib.ExitStack()
        self._timer: asyncio.TimerHandle | None = None

    async def head(self, request: Request) -> Response:
        digest = _digest(request)
        if not await asyncio.to_thread(self._parts.store.has, digest):
            raise NotFound(f"blob {digest} not found")
        return Response(b"", 200)

    async def post(self, request: Request) -> Response:
        """201 once the store has it, 200 where it was there."""
        try:
            digest = _digest(request)
        except PierError:
            await _skim(request)
            raise
        length = request.headers.get("content-length", "")
        size = int(length) if length.isdecimal() and len(length) < 16 else None
        await asyncio.to_thread(self._keep)
        self._rearm()
        ingest = await self._begun(digest, size)
        try:
            if ingest.done is not None:
                async for _ in request.stream():
                    pass
                return Response(b"", 200)
            async for piece in _pieces(request.stream()):
                await finished(ingest.write, piece)
            if ingest.digest != digest:
                raise UsageError(f"digest mismatch, expected {digest}, got {ingest.digest}")
            await finished(ingest.commit)
        except ClientDisconnect:
            return Response(b"", 400)  # nobody hears it
        finally:
            await finished(self._end, ingest)
            self._rearm()
        return answer({"digest": digest}, 201)

    async def _begun(self, digest: str, size: int | None) -> Ingest:
        """The transfer from its beginning: what an earlier one left is dropped, as all of it is sent again."""
        while True:
            ingest = self._parts.store.ingest(digest, size=size, digest=digest)
            await entered(ingest)
            if not ingest.offset:
                return ingest
            await finished(self._end, ingest)

    @staticmethod
    def _end(ingest: Ingest) -> None:
        try:
            if ingest.done is None:
                ingest.abort()
        finally:
            ingest.__exit__(None, None, None)

    def _keep(self) -> None:
        if self._timer is None:
            self._lease.enter_context(self._parts.store.lease())

    def _rearm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(_KEPT, self._release)

    def _release(self) -> None:
        self._timer = None
        self._lease.close()


def _digest(request: Request) -> str:
    """The digest of the path; Ollama's own folders write it with a dash."""
    digest = str(request.path_params["digest"]).replace("sha256-", "sha256:", 1)
    if not DIGEST.fullmatch(digest):
        raise UsageError(f"invalid digest {digest[:100]!r}", hint="Write sha256: and 64 hex digits.")
    return digest


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Fewer, larger pieces: each is a step to another thread."""
    kept, size = list[bytes](), 0
    async for chunk in chunks:
        kept.append(chunk)
        size += len(chunk)
        if size >= _PIECE:
            yield b"".join(kept)
            kept, size = [], 0
    if kept:
        yield b"".join(kept)


async def _skim(request: Request) -> None:
    """Read a little of a body that is refused: a connection that closes on unread bytes may take the answer with it."""
    size = 0
    with contextlib.suppress(ClientDisconnect):
        async for piece in request.stream():
            size += len(piece)
            if size > _SKIM:
                return
