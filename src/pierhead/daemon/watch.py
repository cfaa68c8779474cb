"""Notices changes in a folder through inotify; reads no file."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

_CREATED = 0x100
_MODIFIED = 0x2
_WRITTEN = 0x8
_MOVED_IN = 0x80
_GONE = 0x40 | 0x200  # moved out, deleted
_ALL = _CREATED | _WRITTEN | _MOVED_IN | _GONE
_HEADER = struct.Struct("iIII")


class FolderWatch:
    """An inotify descriptor for one folder; ``names`` returns the files that came, changed or went since.

    A file has changed when who wrote it closes it; with ``contents``, at each write.
    """

    def __init__(self, folder: Path, *, contents: bool = False) -> None:
        wanted = _ALL | _MODIFIED if contents else _ALL
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(folder), wanted) < 0:
            number = ctypes.get_errno()
            self.close()
            raise OSError(number or errno.EIO, f"cannot watch {folder}: {os.strerror(number)}")

    def names(self) -> set[str]:
        """Names of changed files; empties the queue, does not block."""
        found: set[str] = set()
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return found
        at = 0
        while at < len(data):
            length = _HEADER.unpack_from(data, at)[3]
            at += _HEADER.size
            found.add(os.fsdecode(data[at : at + length].rstrip(b"\0")))
            at += length
        return found

    def wait(self, ready: Callable[[], bool], timeout: float) -> bool:
        """Block until ``ready()``, looked at now and after every change; False when ``timeout`` seconds passed."""
        deadline = time.monotonic() + timeout
        while not ready():
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                return ready()
            self.names()
        return True

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@contextmanager
def watched(folder: Path, *, contents: bool = False) -> Generator[FolderWatch]:
    """A FolderWatch for the length of a ``with``."""
    watch = FolderWatch(folder, contents=contents)
    try:
        yield watch
    finally:
        watch.close()
