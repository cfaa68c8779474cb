"""A partial file in the cache folder: what an interrupted transfer received; read again before it goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pierhead.sources.threads import finished
from pierhead.store.files import os_errors

CHUNK = 1 << 20


class Spool:
    """A sink that keeps all bytes in a file and hands each to ``feed``, those of earlier tries first."""

    def __init__(self, path: Path, feed: Callable[[bytes], None], changed: Callable[[int], None]) -> None:
        self.path = path
        self._feed = feed
        self._changed = changed
        self._offset = 0

    @property
    def offset(self) -> int:
        return self._offset

    async def open(self, *, most: int | None = None) -> None:
        """Hand on what is there already, up to ``most`` bytes."""
        await finished(self._replay, most)
        self._changed(self._offset)

    def _replay(self, most: int | None) -> None:
        with os_errors("cannot keep the download"):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = self.path.open("ab+", buffering=0)
            size = self._file.seek(0, os.SEEK_END)
            limit = size if most is None else min(size, most)
            self._file.seek(0)
            while self._offset < limit and (data := self._file.read(min(CHUNK, limit - self._offset))):
                self._feed(data)
                self._offset += len(data)
            self._file.truncate(self._offset)
            self._file.seek(self._offset)

    def close(self) -> None:
        self._file.close()

    async def write(self, data: bytes) -> None:
        await finished(self._write, data)
        self._changed(self._offset)

    async def write_all(self, chunks: list[bytes]) -> None:
        await finished(self._write_all, chunks)
        self._changed(self._offset)

    def _write_all(self, chunks: list[bytes]) -> None:
        for chunk in chunks:
            self._write(chunk)

    def _write(self, data: bytes) -> None:
        with os_errors("cannot keep the download"):
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        self._offset += len(data)
        self._feed(data)

    async def restart(self) -> None:
        """What was handed on cannot be taken back, so the file goes and the transfer has to begin again."""
        await finished(self._file.truncate, 0)
        self._offset = 0
        raise Restarted

    async def checkpoint(self) -> None:
        await finished(os.fsync, self._file.fileno())


class Restarted(Exception):  # tells the owner of the spool to begin again
    """The file behind the address is another one than before."""
