"""Calls of a model's methods: plain ones in threads of their own, so that the event loop goes on; async ones on it."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from . import faults

AHEAD = 64  # pieces of a stream that a model may be ahead of its reader
_END = object()


class Calls:
    """Runs ``threads`` plain calls at a time; with one, the model is loaded and asked in the same thread always."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "model")
        self.running = 0
        self.waiting = 0
        self.done = 0

    async def ask(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """The same as ``call`` for a request: what the model raises becomes a Fault."""
        try:
            return await self.call(function, *args, **named)
        except Exception as exc:  # the model's own, of whatever kind
            raise faults.of(exc) from None

    async def call(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Its result, whether it is a coroutine function or not."""
        if inspect.iscoroutinefunction(function):
            self.running += 1
            try:
                return await function(*args, **named)
            finally:
                self.running -= 1
                self.done += 1
        found = await self._queue(function, args, named)
        return await found if inspect.isawaitable(found) else found

    def _queue(self, function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> asyncio.Future[Any]:
        """Have it called as soon as a thread is free; cancelling what is given takes it out again."""

        def left(asked: Future[Any]) -> None:
            if asked.cancelled():  # while it waited
                self.waiting -= 1

        self.waiting += 1
        asked = self._pool.submit(self._work, function, args, named)
        asked.add_done_callback(left)
        return asyncio.wrap_future(asked)

    def _work(self, function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self.waiting -= 1
        self.running += 1
        try:
            return function(*args, **named)
        except StopIteration as exc:  # a future cannot carry it
            raise RuntimeError("StopIteration was raised") from exc
        finally:
            self.running -= 1
            self.done += 1

    async def stream(self, function: Callable[..., Any], *args: Any, **named: Any) -> AsyncGenerator[Any]:
        """The pieces of a generator function, plain or async; closing this ends it, Fault says that it broke."""
        plain = not inspect.isasyncgenfunction(function)
        made: AsyncGenerator[Any] = (
            self._threaded(lambda: function(*args, **named)) if plain else function(*args, **named)
        )
        try:
            async for piece in made:
                yield piece
        except Exception as exc:  # the model's own, of whatever kind
            raise faults.of(exc) from None
        finally:
            await made.aclose()

    async def _threaded(self, make: Callable[[], Any]) -> AsyncGenerator[Any]:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Any] = asyncio.Queue()
        room = threading.Semaphore(AHEAD)
        gone = threading.Event()

        def tell(item: Any) -> None:
            if not gone.is_set():
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        def work() -> None:
            made: Any = None
            try:
                made = make()
                for piece in made:
                    room.acquire()
                    if gone.is_set():
                        break
                    tell((piece,))
                tell(_END)
            except Exception as exc:  # the reader raises it
                tell(exc)
            finally:
                if made is not None:
                    made.close()

        asked = self._queue(work, (), {})
        try:
            while (item := await pieces.get()) is not _END:
                if isinstance(item, Exception):
                    raise item
                room.release()
                yield item[0]
        finally:
            gone.set()
            room.release()
            asked.cancel()


def streams(function: Callable[..., Any]) -> bool:
    """Whether a method gives its answer in pieces."""
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
