"""The lock between processes leaves threads to those who hold it, and is gone when who waits for it gives up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pierhead.runtimes.lock import locked


async def test_however_many_wait_the_holder_still_gets_a_thread(tmp_path: Path) -> None:
    done: list[int] = []

    async def work(number: int) -> None:
        async with locked(tmp_path / "lock"):
            await asyncio.to_thread(done.append, number)

    async with asyncio.timeout(30):
        await asyncio.gather(*(work(number) for number in range(50)))
    assert sorted(done) == list(range(50))


async def test_a_wait_that_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    async with asyncio.timeout(30):
        async with locked(tmp_path / "lock"):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), locked(tmp_path / "lock"):
                    pass
        async with locked(tmp_path / "lock"):
            pass
