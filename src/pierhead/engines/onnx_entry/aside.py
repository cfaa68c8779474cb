"""Work about large bodies happens in a thread, so that small requests do not wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

LARGE = 64 << 10  # bytes
T = TypeVar("T")


async def aside(size: int, work: Callable[[], T]) -> T:
    """What ``work`` gives; ``size`` is of what it is about."""
    return await asyncio.to_thread(work) if size > LARGE else work()
