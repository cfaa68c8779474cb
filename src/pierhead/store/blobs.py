"""Blobs: bytes are hashed while they stream in and appear under their digest in one step; knows nothing of models."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from pierhead.errors import CorruptData, OutOfSpace, UsageError
from pierhead.store.files import locked, os_errors, replace, start_writing, sync_file, sync_folder
from pierhead.store.model import Blob

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
CHUNK = 1 << 20
CHECKPOINT = 256 << 20  # bytes between two points that survive a power cut
EARLY = 8 << 20  # bytes that the disk is told to begin with: it works while more comes, and a checkpoint waits less


class _Mark(msgspec.Struct):
    boot: str
    offset: int


def boot_id() -> str:
    """The identity of this boot; page cache does not outlive it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def check_digest(digest: str) -> str:
    """Return ``digest`` when it is a SHA-256 digest; UsageError otherwise (it becomes a path)."""
    if not DIGEST.fullmatch(digest):
        raise UsageError(f"not a sha256 digest: {digest[:100]!r}")
    return digest


def digest_of(data: bytes) -> str:
    """``sha256:…`` of bytes in memory."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def touch(path: Path) -> bool:
    """Whether a path is there; if so only its ctime moves. The caller holds the index's lock."""
    try:
        path.chmod(path.stat().st_mode & 0o777)
    except FileNotFoundError:
        return False
    return True


class Blobs:
    """The folder ``blobs/sha256`` and the ingests that lead into it."""

    def __init__(self, root: Path, step: Callable[[str], None]) -> None:
        self.folder = root / "blobs" / "sha256"
        self.ingests = root / "ingest"
        self.step = step

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be."""
        return self.folder / check_digest(digest).removeprefix("sha256:")

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def claim(self, digest: str) -> bool:
        """Whether the blob is there; if so it counts as new, so that no collector takes it from a lease's holder."""
        return self.renew(self.path(digest))

    def renew(self, path: Path) -> bool:
        """``claim`` for a path: a blob, or a model's folder."""
        if not path.exists():
            return False
        with locked(self.ingests.parent / "index.lock"):  # a collector that has chosen already ends first
            return touch(path)

    def put(self, data: bytes) -> Blob:
        """A small blob (a manifest, a config) at once."""
        digest = digest_of(data)
        if not self.claim(digest):
            replace(self.path(digest), data, 0o444)
        return Blob(digest, len(data))

    def publish(self, file: Path, digest: str) -> None:
        """Give a complete, hashed file its name; from here on it exists, after a power cut too."""
        target = self.path(digest)
        file.chmod(0o444)
        sync_file(file)
        self.step("blob:synced")
        os.replace(file, target)
        self.step("blob:renamed")
        sync_folder(self.folder)


class Ingest:
    """One blob on its way in; a context manager that holds the transfer's lock, so that only one process fetches it.

    ``offset`` bytes have landed and are hashed. Leaving without ``commit`` keeps them for the next try; ``abort`` drops
    them. ``done`` is the blob when another process finished it while this one waited for the lock.
    """

    def __init__(
        self,
        blobs: Blobs,
        key: str,
        *,
        size: int | None = None,
        digest: str | None = None,
        waiting: Callable[[Path], None] | None = None,
    ) -> None:
        self._blobs = blobs
        self._size = size
        self._digest = check_digest(digest) if digest else None
        self._waiting = waiting
        stem = hashlib.sha256((digest or key).encode()).hexdigest()[:32]
        self.part = blobs.ingests / f"{stem}.part"
        self._mark = blobs.ingests / f"{stem}.mark"
        self._done_mark = blobs.ingests / f"{stem}.done"
        self._lock = locked(blobs.ingests / f"{stem}.lock", waiting=self._tell)
        self._hash = hashlib.sha256()
        self.offset = 0
        self.resumed = 0
        self.done: Blob | None = None
        self._waited = False

    def _tell(self) -> None:
        self._waited = True
        if self._waiting is not None:
            self._waiting(self.part)

    def __enter__(self) -> Self:
        with os_errors("cannot store the download"):
            self._lock.__enter__()
            try:
                self._open()
            except BaseException:
                if self.offset == 0 and self.done is None:
                    self.abort()  # nothing has landed: leave no empty file behind
                self.__exit__(None, None, None)
                raise
        return self

    def _open(self) -> None:
        self.done = self._finished()
        if self.done is not None:
            return
        self._done_mark.unlink(missing_ok=True)  # of an earlier transfer: who waits for this one asks for its end
        self._file = self.part.open("ab+", buffering=0)
        self._file.seek(0)
        landed = min(self._landed(), self._size if self._size is not None else 1 << 62)
        while self.offset < landed and (chunk := self._file.read(min(CHUNK, landed - self.offset))):
            self._hash.update(chunk)
            self.offset += len(chunk)
        self._file.truncate(self.offset)
        self._file.seek(self.offset)
        self.resumed = self._marked = self._told = self.offset
        self._room()

    def _finished(self) -> Blob | None:
        """The blob, when the digest is known and there, or when the transfer that was waited for ended in it."""
        digest = self._digest
        if digest is None and self._waited and self._done_mark.exists():
            digest = self._done_mark.read_text().strip()
        if digest and DIGEST.fullmatch(digest) and self._blobs.claim(digest):
            return Blob(digest, self._blobs.path(digest).stat().st_size)
        return None

    def _landed(self) -> int:
        """Bytes that can be trusted to be on disk: all within one boot, else up to the last durable point."""
        size = self.part.stat().st_size
        try:
            mark = msgspec.json.decode(self._mark.read_bytes(), type=_Mark)
        except (FileNotFoundError, msgspec.DecodeError):
            return 0
        return size if mark.boot == boot_id() else min(size, mark.offset)

    def _room(self) -> None:
        self._save_mark()
        if self._size is None:
            return
        free = os.statvfs(self.part.parent)
        need = self._size - self.offset
        if free.f_bavail * free.f_frsize < need:
            raise OutOfSpace(
                f"the disk has {free.f_bavail * free.f_frsize:,} bytes free, the download needs {need:,} more",
                hint="Free some space (`pier df`, `pier prune`, `pier rm NAME`), then try again.",
                data={"needed": need, "free": free.f_bavail * free.f_frsize},
            )

    def _save_mark(self) -> None:
        replace(self._mark, msgspec.json.encode(_Mark(boot_id(), self.offset)))
        self._marked = self.offset

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; CorruptData when they exceed the expected size, OutOfSpace when the disk is full."""
        if self._size is not None and self.offset + len(data) > self._size:
            raise CorruptData(f"the source sent more than the {self._size} bytes it announced")
        view = memoryview(data)
        with os_errors("cannot store the download"):
            while view:
                written = self._file.write(view)
                self._hash.update(view[:written])
                self.offset += written
                view = view[written:]
            if self.offset - self._told >= EARLY:
                start_writing(self._file.fileno(), self._told, self.offset - self._told)
                self._told = self.offset
            if self.offset - self._marked >= CHECKPOINT:
                self.checkpoint()

    @property
    def digest(self) -> str:
        """Of what has landed so far."""
        return "sha256:" + self._hash.hexdigest()

    def checkpoint(self) -> None:
        """Make what has landed survive a power cut."""
        os.fsync(self._file.fileno())
        self._save_mark()

    def commit(self) -> Blob:
        """Check size and digest and publish the blob; CorruptData (and nothing kept) when they do not match."""
        if self.done is not None:
            return self.done
        digest = self.digest
        if self._size is not None and self.offset != self._size:
            raise CorruptData(f"the source ended after {self.offset} of {self._size} bytes", hint="Try again.")
        if self._digest is not None and digest != self._digest:
            self.abort()
            raise CorruptData(
                f"the bytes have digest {digest}, expected {self._digest}",
                hint="The source changed or is damaged; nothing was kept. Try again, or another source.",
            )
        with os_errors("cannot store the download"):
            if self._blobs.claim(digest):
                self.part.unlink()
            else:
                self._blobs.publish(self.part, digest)
            if self._digest is None:
                self._done_mark.write_text(digest)
            self._mark.unlink(missing_ok=True)
        self.done = Blob(digest, self.offset)
        return self.done

    def abort(self) -> None:
        """Drop what has landed."""
        self.part.unlink(missing_ok=True)
        self._mark.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            file.close()
        self._lock.__exit__(None, None, None)
