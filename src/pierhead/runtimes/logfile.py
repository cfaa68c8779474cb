"""Reading an engine's rotated log, to its end or as it grows; writes nothing."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

LINE_LIMIT = 1 << 16
LOOK = 0.1  # seconds between looks at a file that grows: the kernel offers asyncio nothing better for files


async def read_log(path: Path, ended: asyncio.Future[Any], *, tail: int | None, follow: bool) -> AsyncIterator[bytes]:
    """Whole lines of ``path.1`` and ``path``, the last ``tail`` of them; with ``follow`` until ``ended``."""
    kept: deque[bytes] = deque(maxlen=tail)
    rest = b""
    for file in (path.with_name(path.name + ".1"), path):
        try:
            data = rest + file.read_bytes()
        except FileNotFoundError:
            continue
        *lines, rest = data.split(b"\n")
        kept.extend(line[:LINE_LIMIT] + b"\n" for line in lines)
    if rest and not follow:
        kept.append(rest + b"\n")
    for line in kept:
        yield line
    if follow:
        async for line in _grow(path, ended, rest):
            yield line


async def _grow(path: Path, ended: asyncio.Future[Any], rest: bytes) -> AsyncIterator[bytes]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    file.seek(0, os.SEEK_END)
    try:
        while True:
            last = ended.done()
            while chunk := file.read(1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line[:LINE_LIMIT] + b"\n"
            if last:
                break
            if _inode(path) not in (None, os.fstat(file.fileno()).st_ino):
                file.close()
                file = path.open("rb")
                continue
            await asyncio.wait((ended,), timeout=LOOK)
        if rest:
            yield rest + b"\n"
    finally:
        file.close()


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
