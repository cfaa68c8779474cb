"""Blocking calls in threads, for callers that may be cancelled: locks are not leaked, writes are never left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def finished(call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Run a short call in a thread; a cancelled caller goes on only when the call has ended."""
    task = asyncio.ensure_future(asyncio.to_thread(call, *args, **options))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # looked at, so that it is not reported as lost
        raise


async def entered(context: AbstractContextManager[T]) -> T:
    """Enter a context that may block for long (a lock), in a thread that a cancelled caller does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.done():  # cancelled meanwhile: nobody will leave the context, so leave it here
            if error is None:
                context.__exit__(None, None, None)
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # pyright: ignore[reportArgumentType]

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = context.__enter__()
        except BaseException as exc:  # carried over to the caller
            error = exc
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:  # the loop is closed
            if error is None:
                context.__exit__(None, None, None)

    threading.Thread(target=run, name="pull-lock", daemon=True).start()
    return await future
