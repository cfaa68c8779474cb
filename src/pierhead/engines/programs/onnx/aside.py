"""Work about large bodies happens in a thread, one after the other: small requests do not wait, memory is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LARGE = 64 << 10  # bytes
T = TypeVar("T")
_thread = ThreadPoolExecutor(1, "large")  # JSON takes many times its size while it is read or written


async def aside(size: int, work: Callable[[], T]) -> T:
    """What ``work`` gives; ``size`` is of what it is about."""
    if size <= LARGE:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_thread, work)
