"""Requests that come together are given to the model together: up to a number of items, after a short wait at most."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from .faults import Fault


class _Asked(NamedTuple):
    items: Sequence[Any]
    answer: asyncio.Future[list[Any]]


class Batcher:
    """Collects items for ``work``, which is given a list and gives one of the same length.

    A batch is closed when it has ``size`` items or ``delay`` seconds after its first one. One at a time is worked on,
    so that what arrives meanwhile makes the next. A batch that fails is tried again request by request: one that the
    model cannot take does not fail those that happened to come with it.
    """

    def __init__(self, work: Callable[[list[Any]], Awaitable[Any]], size: int, delay: float) -> None:
        self._work = work
        self._size = size
        self._delay = delay
        self._waiting: list[_Asked] = []
        self._count = 0
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def ask(self, items: Sequence[Any]) -> list[Any]:
        """The answers for these items, in their order."""
        if not items:
            return []
        if len(items) > self._size:
            parts = [items[at : at + self._size] for at in range(0, len(items), self._size)]
            return [one for part in await asyncio.gather(*map(self.ask, parts)) for one in part]
        asked = _Asked(items, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self._count += len(items)
        if self._count >= self._size:
            self._full.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await asked.answer

    async def _run(self) -> None:
        try:
            while self._waiting:
                if self._delay and self._count < self._size:
                    self._full.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._full.wait(), self._delay)
                await self._serve(self._take())
        finally:
            self._task = None

    def _take(self) -> list[_Asked]:
        """The next requests that fit into one batch; those whose client has gone are left out."""
        taken: list[_Asked] = []
        count = 0
        while self._waiting and (not taken or count + len(self._waiting[0].items) <= self._size):
            asked = self._waiting.pop(0)
            self._count -= len(asked.items)
            if not asked.answer.done():
                taken.append(asked)
                count += len(asked.items)
        return taken

    async def _serve(self, batch: list[_Asked]) -> None:
        try:
            found = await self._ask_model([item for asked in batch for item in asked.items])
        except Exception as exc:  # the model's own: told to whoever asked
            if len(batch) > 1:
                for asked in batch:
                    await self._serve([asked])
            elif batch and not batch[0].answer.done():
                batch[0].answer.set_exception(exc)
            return
        at = 0
        for asked in batch:
            if not asked.answer.done():
                asked.answer.set_result(found[at : at + len(asked.items)])
            at += len(asked.items)

    async def _ask_model(self, items: list[Any]) -> list[Any]:
        if not items:
            return []
        found = await self._work(items)
        try:
            answers = list(found)
        except TypeError:
            answers = None
        if answers is None or len(answers) != len(items):
            said = type(found).__name__ if answers is None else f"{len(answers)} answers"
            raise Fault(500, "model_failed", f"the model was given {len(items)} items and gave {said}")
        return answers
