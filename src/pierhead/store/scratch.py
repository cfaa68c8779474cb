"""Folders of the store for work whose outcome is to be committed; what a killed process left of one is garbage."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

from pierhead.store.files import is_locked, locked, os_errors, remove_tree

_NAME = re.compile(r"\.(?:quantize|convert)-\w+")


@contextlib.contextmanager
def scratch(root: Path, work: str) -> Generator[Path]:
    """A new folder below the store's ``root``, gone afterwards; ``work`` is what it is for, quantize or convert.

    Its lock dies with the process, and tells the collector that somebody is at work there.
    """
    with os_errors("cannot write to the store"), locked(root / "index.lock"):  # no collector sees it without its lock
        folder = Path(tempfile.mkdtemp(prefix=f".{work}-", dir=root))
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        remove_tree(folder)
        os.close(held)


def dead(root: Path) -> list[Path]:
    """The folders in which nobody works any more."""
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink() and not is_locked(path)]
