"""The server's handle on the process that paints: one picture at a time, and a new process where one was lost."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import wire
from .faults import Gone, Refused, Unusable

_LIMIT = 64 << 20


class Made(NamedTuple):
    """A picture as rows of red, green and blue."""

    width: int
    height: int
    pixels: bytes


class Worker:
    """``command`` starts the painter; ``queue`` is how many pictures may wait. Counts for the metrics."""

    def __init__(self, command: Sequence[str], queue: int) -> None:
        self._command = command
        self._queue = queue
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._load_s = 0.0
        self.waiting = self.running = self.steps = self.made = self.given_up = self.lost = 0
        self.broken = asyncio.Event()
        self.reason = ""

    async def start(self) -> None:
        """A process with the model in memory; Unusable with the reason."""
        began = time.monotonic()
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=_LIMIT)
        try:
            head, _ = await self._receive()
        except asyncio.IncompleteReadError:
            raise Unusable(f"the model cannot be loaded: {await self._ended()}") from None
        if "ready" not in head:
            await self.stop()
            raise Unusable(f"stable-diffusion.cpp cannot use the model: {head.get('failed')}")
        self._load_s = time.monotonic() - began

    async def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def paint(
        self, job: dict[str, Any], blobs: Sequence[bytes], gone: asyncio.Event, seen: Callable[[Made], None]
    ) -> Made:
        """One picture; ``seen`` hears of it on the way. Refused when too many wait, Gone when nobody wants it."""
        if self.waiting >= self._queue:
            raise Refused("too many pictures wait; try again later", status=429, code="queue_full")
        self.waiting += 1
        try:
            await _unless(gone, self._turn.acquire())
        finally:
            self.waiting -= 1
        self.running = 1
        try:
            if gone.is_set():
                raise Gone
            return await self._paint(job, blobs, gone, seen)
        finally:
            self.running = 0
            self._turn.release()

    async def _paint(
        self, job: dict[str, Any], blobs: Sequence[bytes], gone: asyncio.Event, seen: Callable[[Made], None]
    ) -> Made:
        if self.reason:
            raise Refused(self.reason, status=503, code="unavailable")
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(wire.packed({"job": job}, *blobs))
            await process.stdin.drain()
            return await self._follow(gone, seen)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lost += 1
            why = await self._ended()
            await self._again()
            raise Refused(f"stable-diffusion.cpp failed at this picture: {why}", status=500, code="engine") from None

    async def _follow(self, gone: asyncio.Event, seen: Callable[[Made], None]) -> Made:
        """Read until the picture is there; what nobody waits for is given up where that is the shorter way."""
        left_s = 0.0
        while True:
            head, blobs = await self._hear(gone, left_s > self._load_s)
            if "step" in head:
                step, steps, pace = head["step"]
                left_s = (steps - step) * pace
                self.steps += step > 0
            elif "partial" in head:
                width, height = head["partial"]
                seen(Made(width, height, blobs[0]))
            elif "picture" in head:
                self.made += 1
                width, height = head["picture"]
                return Made(width, height, blobs[0])
            else:
                raise Refused(str(head.get("failed")), status=500, code="engine")

    async def _hear(self, gone: asyncio.Event, long: bool) -> tuple[dict[str, Any], list[bytes]]:
        heard = asyncio.ensure_future(self._receive())
        watch = asyncio.ensure_future(gone.wait())
        try:
            while not heard.done():
                if gone.is_set() and long:
                    heard.cancel()
                    await self._give_up()
                    raise Gone
                await asyncio.wait({heard} if gone.is_set() else {heard, watch}, return_when=asyncio.FIRST_COMPLETED)
            return heard.result()
        finally:
            watch.cancel()

    async def _give_up(self) -> None:
        self.given_up += 1
        await self.stop()
        await self._again()

    async def _again(self) -> None:
        """A new process; where that fails this server is of no use any more."""
        try:
            await self.start()
        except (Unusable, OSError) as exc:
            self.reason = str(exc)
            self.broken.set()

    async def _receive(self) -> tuple[dict[str, Any], list[bytes]]:
        assert self._process is not None
        assert self._process.stdout is not None
        return await wire.receive(self._process.stdout)

    async def _ended(self) -> str:
        """How the process ended, in words."""
        assert self._process is not None
        code = await self._process.wait()
        if code >= 0:
            return f"its process ended with {code}"
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


async def _unless(gone: asyncio.Event, wanted: Any) -> None:
    """Wait for something, but only as long as somebody wants it; what came at the same time is kept."""
    task, watch = asyncio.ensure_future(wanted), asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    if task.cancelled():
        raise Gone
