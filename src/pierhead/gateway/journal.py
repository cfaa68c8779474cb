"""The usage journal: a line per request, on disk before its answer has left and with no system call; sums nothing.

A line goes into a mapped file: what is in its pages outlives ``kill -9``, and storing it costs half of what a write
does. The space is allocated beforehand, so that a full disk is an error here and not a signal later.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from pathlib import Path

import msgspec

from pierhead.gateway.journal_lines import SUFFIX, files
from pierhead.gateway.outcome import Outcome

LINE_MAX = 65536
_FIRST = 256 * 1024  # bytes of a gateway's first file; each next one is twice as long, up to _MOST
_MOST = 4 << 20
_ALL = 1 << 30  # bytes of all journals together, when no daemon takes them away: some six million requests
_RETRY = 1.0
_encode = msgspec.json.Encoder().encode


class Journal:
    """Writes below ``folder``; ``lost`` counts requests that could not be written (disk full, no daemon for long)."""

    def __init__(self, folder: Path, *, most: int = _ALL) -> None:
        self.lost = 0
        self._folder = folder
        self._most = most
        self._name = f"{time.time_ns():x}-{os.urandom(4).hex()}"
        self._files = 0
        self._size = _FIRST
        self._fd = -1
        self._map: mmap.mmap | None = None
        self._at = 0
        self._end = 0
        self._retry_at = 0.0

    def put(self, outcome: Outcome) -> None:
        """Write one line. Its end comes last: a reader never takes half a line for a whole one."""
        usage = outcome.usage
        line = _encode(
            (
                outcome.time,
                outcome.id,
                outcome.key,
                outcome.operation,
                outcome.model,
                outcome.status,
                outcome.ok,
                usage.prompt,
                usage.cached,
                usage.completion,
                outcome.cost,
                outcome.seconds,
                outcome.revision,
            )
        )
        end = self._at + len(line)
        if end >= self._end:
            if not self._next(len(line)):
                self.lost += 1
                return
            end = self._at + len(line)
        pages = self._map
        assert pages is not None
        pages[self._at : end] = line
        pages[end] = 10
        self._at = end + 1

    def close(self) -> None:
        """Leave the file as long as what is in it; unlocked, it tells that nothing more comes."""
        if self._map is not None:
            self._map.close()
            self._map = None
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._at)
            os.close(self._fd)
        self._at = self._end = 0

    def _next(self, length: int) -> bool:
        """Go on in a new file; False when there is no room for one."""
        self.close()
        now = time.monotonic()
        if now < self._retry_at or length >= LINE_MAX:
            return False
        self._retry_at = now + _RETRY
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if sum(size for _, size in files(self._folder)) + self._size > self._most:
                return False
            self._open()
        except OSError:
            return False
        self._retry_at = 0.0
        return True

    def _open(self) -> None:
        """A file of its final size, locked before it can be seen under its name."""
        self._files += 1
        path = self._folder / f"{self._name}-{self._files:08d}{SUFFIX}"
        partial = path.with_suffix(".new")
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, self._size)
            self._map = mmap.mmap(fd, self._size)
            partial.rename(path)
        except BaseException:
            os.close(fd)
            partial.unlink(missing_ok=True)
            raise
        self._fd, self._end = fd, self._size
        self._size = min(self._size * 2, _MOST)
