"""Reading an engine's rotated log, to its end or as it grows; writes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

LINE_LIMIT = 1 << 16
LOOK = 0.1  # seconds between looks at a file that grows: the kernel offers asyncio nothing better for files


class Lines:
    """Cuts what is fed into whole lines of bounded length."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_LIMIT:  # a line without end must not grow without end
            lines, self._rest = [*lines, self._rest], b""
        return [line[:LINE_LIMIT] + b"\n" for line in lines]

    def end(self) -> list[bytes]:
        """The last line, which lacks its end."""
        rest, self._rest = self._rest, b""
        return [rest[:LINE_LIMIT] + b"\n"] if rest else []

    def whole(self, path: Path) -> Iterator[bytes]:
        """The lines of a file that may not be there."""
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            yield from self.drain(file)

    def drain(self, file: BinaryIO) -> Iterator[bytes]:
        """The lines that ``file`` holds from where it stands."""
        while chunk := file.read(1 << 16):
            yield from self.feed(chunk)


async def read_log(path: Path, ended: asyncio.Future[Any], *, tail: int | None, follow: bool) -> AsyncIterator[bytes]:
    """Whole lines of ``path.1`` and ``path``, the last ``tail`` of them; with ``follow`` until ``ended``."""
    kept: deque[bytes] = deque(maxlen=tail)
    cutter = Lines()
    last = ended.done()
    kept.extend(cutter.whole(path.with_name(path.name + ".1")))
    file = _open(path)
    try:
        if file is not None:
            kept.extend(cutter.drain(file))
        if not follow or last:
            kept.extend(cutter.end())
        for line in kept:
            yield line
        while follow and file is not None and not last:
            last = ended.done()
            newer = _newer(path, file)  # looked for before the last lines are read: nothing is added once it moved
            for line in cutter.drain(file):
                yield line
            if newer is not None:
                file.close()
                file, last = newer, False
            elif not last:
                await asyncio.wait((ended,), timeout=LOOK)
        for line in cutter.end():
            yield line
    finally:
        if file is not None:
            file.close()


def _open(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _newer(path: Path, file: BinaryIO) -> BinaryIO | None:
    """What is at ``path`` when that is another file by now."""
    found = _open(path)
    if found is not None and os.fstat(found.fileno()).st_ino == os.fstat(file.fileno()).st_ino:
        found.close()
        return None
    return found
