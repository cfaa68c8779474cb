"""The ends of a replica's program and of its requests; decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pierhead.runtimes.base import Instance


async def drained(idle: Coroutine[Any, Any, object], instance: Instance, drain: float) -> None:
    """Return when it is idle, when its program has ended, or after ``drain`` seconds."""
    waiting = asyncio.create_task(idle)
    gone = asyncio.create_task(instance.wait())
    try:
        await asyncio.wait({waiting, gone}, timeout=drain, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        gone.cancel()
        await asyncio.gather(waiting, gone, return_exceptions=True)


async def finish(instance: Instance, ended: Callable[[], None]) -> None:
    """End the program; ``ended`` is called as soon as it is gone, before what it left behind is cleared away."""
    ending = asyncio.ensure_future(instance.stop())
    gone = asyncio.ensure_future(instance.wait())
    try:
        await asyncio.wait({ending, gone}, return_when=asyncio.FIRST_COMPLETED)
        ended()
        await ending
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
