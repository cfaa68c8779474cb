"""An exclusive lock between processes, waited for without blocking the loop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncGenerator
from pathlib import Path

_PAUSE = 0.05


@contextlib.asynccontextmanager
async def locked(path: Path) -> AsyncGenerator[int]:
    """Hold an exclusive lock between processes; a cancelled wait leaves nothing behind.

    A program that is given the file descriptor holds it, too, until it ends, even when this process is killed.

    It asks again and again: who waits in a thread takes it from those who hold the lock and need one to go on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _taken(fd):  # noqa: ASYNC110  # another process tells nobody when it lets go
            await asyncio.sleep(_PAUSE)
        yield fd
    finally:
        os.close(fd)


def _taken(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
