"""Runs a program to its end in a runtime and hands over what it wrote; keeps nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

from pierhead.engines.base import LaunchSpec
from pierhead.errors import EngineFailed, Timeout
from pierhead.events import BuildProgress, Listener
from pierhead.runtimes.base import Instance, Runtime
from pierhead.runtimes.readiness import failure, last_lines

_LAST_WORDS = 5.0  # seconds for what the program said at its very end
OUTPUT = "out"  # the folder below the instance's own that a job writes into, and goes with it


@contextlib.asynccontextmanager
async def finished(
    runtime: Runtime, spec: LaunchSpec, listener: Listener, timeout: float
) -> AsyncGenerator[Path, None]:
    """The folder that a job has filled, while the block lasts. All of it is gone afterwards, however the job ends.

    EngineFailed with the program's last words when it fails, Timeout after ``timeout`` seconds. A job that an earlier
    daemon left is ended and removed like any instance that nobody knows.
    """
    instance = await runtime.start(spec)
    telling = asyncio.create_task(_tell(instance, listener))
    try:
        try:
            async with asyncio.timeout(timeout):
                end = await instance.wait()
            await asyncio.wait({telling}, timeout=_LAST_WORDS)
        except TimeoutError as exc:
            raise Timeout(
                f"the job for '{spec.model}' did not end in {timeout:g} s", data={"log": await last_lines(instance)}
            ) from exc
        if end.code or end.signal:
            raise await failure(instance, end)
        output = instance.output
        if output is None or not output.is_dir():
            raise EngineFailed(f"the job for '{spec.model}' left no output")
        yield output
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        await asyncio.shield(instance.stop(0))


async def _tell(instance: Instance, listener: Listener) -> None:
    """Pass the program's lines on as they come."""
    async for line in instance.logs(follow=True):
        step = line.decode("utf-8", "replace").strip()[:200]
        if step:
            listener(BuildProgress(image=instance.spec.model, step=step))
