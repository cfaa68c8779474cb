"""Texts of several requests worked on together: what waits when the pipeline is free becomes its next batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .asks import Refused
from .wire import last

QUEUE = 1 << 14  # texts that may wait


class Item(NamedTuple):
    """A text of so many tokens; only those with the same ``key`` (a query) can be in one batch."""

    key: str
    text: str
    length: int


class Batcher:
    """Calls ``run(key, texts)``, which gives one result for each text, in a thread, one batch after the other.

    A batch has at most ``rows`` texts and, padded to the longest, ``tokens`` tokens; a longer text is one by itself.
    """

    def __init__(self, run: Callable[[str, list[str]], Sequence[Any]], rows: int, tokens: int) -> None:
        self._run = run
        self._rows = rows
        self._tokens = tokens
        self._waiting: deque[tuple[Item, asyncio.Future[Any]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self.running = 0  # texts

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def work(self, items: Sequence[Item]) -> list[Any]:
        """The result for each item; Refused when the pipeline fails. A caller that is cancelled takes its items out."""
        if len(self._waiting) + len(items) > QUEUE:
            raise Refused(f"{len(self._waiting)} texts wait already", status=429)
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Any]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
        return await asyncio.gather(*futures)

    async def _drain(self) -> None:
        while batch := self._next():
            items, futures = [item for item, _ in batch], [future for _, future in batch]
            self.running = len(batch)
            try:
                found = await asyncio.to_thread(self._run, items[0].key, [item.text for item in items])
            except Exception as exc:  # the pipeline's own errors have no common type: tell all, go on with the next
                for future in futures:
                    if not future.done():
                        future.set_exception(Refused(f"the pipeline failed: {last(exc)}", status=500))
            else:
                for future, one in zip(futures, found, strict=True):
                    if not future.done():
                        future.set_result(one)
        self.running = 0
        self._task = None

    def _next(self) -> list[tuple[Item, asyncio.Future[Any]]]:
        """Those at the front that fit together; who is gone is left out."""
        batch: list[tuple[Item, asyncio.Future[Any]]] = []
        longest = 0
        while self._waiting and len(batch) < self._rows:
            item, future = self._waiting[0]
            if not future.done():
                longest = max(longest, item.length)
                if batch and (item.key != batch[0][0].key or longest * (len(batch) + 1) > self._tokens):
                    break
                batch.append((item, future))
            self._waiting.popleft()
        return batch
