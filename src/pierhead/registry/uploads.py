"""Uploads that were begun and not ended, remembered between runs so that a killed push goes on; holds no logins."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

import msgspec

from pierhead.registry.wire import origin
from pierhead.store.files import os_errors, replace

LIVES = 7 * 24 * 3600.0  # registries drop unfinished uploads after about a week


class _Record(msgspec.Struct):
    base: str
    repository: str
    digest: str
    location: str


def _nothing(step: str) -> None:
    """Where tests stop a process; production does nothing."""


class Uploads:
    """A folder of them; without one nothing is remembered."""

    def __init__(self, folder: Path | None, step: Callable[[str], None] = _nothing) -> None:
        self._folder = folder
        self._step = step

    @contextlib.contextmanager
    def held(self, base: str, repository: str, digest: str) -> Generator[Upload]:
        """The upload of one blob, for this process alone; another that pushes the same blob remembers nothing."""
        if self._folder is None:
            yield Upload(None, _Record(base, repository, digest, ""), self._step)
            return
        name = hashlib.sha256(f"{base}\n{repository}\n{digest}".encode()).hexdigest()[:32]
        with os_errors("cannot remember the upload"):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _sweep(self._folder)
            lock = os.open(self._folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            file: Path | None = self._folder / f"{name}.json"
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file = None
            yield Upload(file, _Record(base, repository, digest, ""), self._step)
        finally:
            os.close(lock)


class Upload:
    """One of them; calls block on the disk."""

    def __init__(self, file: Path | None, record: _Record, step: Callable[[str], None]) -> None:
        self._file = file
        self._record = record
        self._step = step

    def location(self) -> str:
        """Where it goes on; empty when there is none, or it is not one of this registry's."""
        if self._file is None:
            return ""
        try:
            found = msgspec.json.decode(self._file.read_bytes(), type=_Record)
        except (OSError, msgspec.DecodeError):
            return ""
        mine = self._record
        same = (found.base, found.repository, found.digest) == (mine.base, mine.repository, mine.digest)
        return found.location if same and origin(found.location)[1] else ""

    def remember(self, location: str) -> None:
        """It goes on here."""
        if self._file is not None:
            self._record.location = location
            with os_errors("cannot remember the upload"):
                replace(self._file, msgspec.json.encode(self._record), 0o600)
        self._step("upload:remembered")

    def forget(self) -> None:
        """It has ended, one way or the other."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what no registry knows any more."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LIVES:
                path.unlink()
