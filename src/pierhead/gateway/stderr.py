"""The log file that stderr leads to, opened anew after another program has moved it away; rotates nothing itself."""

from __future__ import annotations

import os
import stat
from contextlib import suppress


class LogOfStderr:
    """Remembers at the start which file that is; a terminal, a pipe or a journal stays as it is. So for stdout."""

    def __init__(self) -> None:
        self._path = _file(2)
        self._fds = tuple(fd for fd in (1, 2) if self._path and _file(fd) == self._path)

    def reopen(self) -> None:
        """Go on at the end of the file that has the name now, or of a new one."""
        with suppress(OSError):
            for each in self._fds:
                fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                os.dup2(fd, each)
                os.close(fd)


def _file(fd: int) -> str:
    with suppress(OSError):
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return os.readlink(f"/proc/self/fd/{fd}")
    return ""
