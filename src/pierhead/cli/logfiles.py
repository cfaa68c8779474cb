"""The logs of Pierhead itself, read from their files, with or without a daemon; engines' logs come from the daemon."""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pierhead.errors import NotFound
from pierhead.paths import Paths

if TYPE_CHECKING:
    from pierhead.daemon.watch import FolderWatch

OWN = ("gateway", "daemon")


def own_log(paths: Paths, name: str) -> Path:
    """The file of one of ``OWN``."""
    return paths.daemon_log if name == "daemon" else paths.state / "gateway.log"


def lines(path: Path, tail: int | None, follow: bool) -> Iterator[bytes]:
    """Its lines without their ends, or the last ``tail``; with ``follow`` those that come, also after a rotation."""
    if not path.exists() and not (follow and path.parent.is_dir()):
        raise NotFound(f"there is no log at {path} yet", hint="`pier serve` starts the daemon and its gateway.")
    with contextlib.ExitStack() as stack:
        watch: FolderWatch | None = None
        if follow:
            from pierhead.daemon.watch import watched

            watch = stack.enter_context(watched(path.parent, contents=True))
        file = _opened(path)
        if file is not None:
            yield from (line.rstrip(b"\n") for line in (file if tail is None else deque(file, tail)))
        if watch is not None:
            yield from _following(path, file, watch)
        elif file is not None:
            file.close()


def _opened(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _following(path: Path, file: BinaryIO | None, watch: FolderWatch) -> Iterator[bytes]:
    part = b""
    while True:
        if file is not None:
            if os.fstat(file.fileno()).st_size < file.tell():  # it was emptied
                file.seek(0)
            for line in file:
                part += line
                if part.endswith(b"\n"):
                    yield part.rstrip(b"\n")
                    part = b""
        if _moved(path, file):
            if file is not None:
                file.close()
            file = _opened(path)
            if file is not None:
                continue
        select.select([watch.fd], [], [])
        watch.names()


def _moved(path: Path, file: BinaryIO | None) -> bool:
    """Whether the name leads to another file now."""
    if file is None:
        return True
    try:
        there, mine = path.stat(), os.fstat(file.fileno())
    except FileNotFoundError:
        return False  # the next one is not there yet
    return (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino)
