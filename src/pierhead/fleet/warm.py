"""Has the kernel read weights ahead that are needed in a moment, while others still end; reads nothing itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def read_ahead(files: Iterable[Path]) -> None:
    """Begin to read what of these files is not in memory. Blocks while the kernel takes the orders in."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:  # not on every system
        return
    for file in files:
        with contextlib.suppress(OSError):
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                advise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)
