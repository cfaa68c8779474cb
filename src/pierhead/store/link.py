"""Taking a user's own file into the store without a second copy where the filesystem allows it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

import msgspec

from pierhead.errors import CorruptData, UsageError
from pierhead.store.blobs import Blobs
from pierhead.store.files import make_folder, reflink, replace, sync_file, sync_folder
from pierhead.store.model import Blob


class LinkRecord(msgspec.Struct, frozen=True):
    """What a linked file looked like when it was hashed; times in nanoseconds."""

    path: str
    inode: int
    size: int
    mtime: int

    @classmethod
    def of(cls, path: Path) -> LinkRecord:
        found = path.stat()
        return cls(str(path), found.st_ino, found.st_size, found.st_mtime_ns)

    @staticmethod
    def check(folder: Path, digest: str) -> None:
        """CorruptData when the blob ``digest`` is a link to a file that was changed; nothing for other blobs."""
        try:
            data = (folder / digest.removeprefix("sha256:")).read_bytes()
        except FileNotFoundError:
            return
        kept = msgspec.json.decode(data, type=LinkRecord)
        blob = folder.parent / "blobs" / "sha256" / digest.removeprefix("sha256:")
        now = LinkRecord.of(blob)
        if (now.inode, now.size, now.mtime) != (kept.inode, kept.size, kept.mtime):
            raise CorruptData(
                f"{kept.path} was changed after it was linked into the store",
                hint=f"Type `pier pull {kept.path}` again; without --link the store keeps its own copy.",
            )

    @staticmethod
    def total(folder: Path, blobs: Blobs) -> int:
        """Bytes of blobs that are also a file of the user's."""
        found = 0
        for name in os.listdir(folder) if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                status = (blobs.folder / name).stat()
                found += status.st_blocks * 512 if status.st_nlink > 1 else 0
        return found


def hash_file(path: Path) -> str:
    """``sha256:…`` of a file."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # twice the read-ahead
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def adopt(blobs: Blobs, links: Path, path: Path, *, link: bool) -> Blob:
    """Reflink, else copy while hashing; with ``link`` a hard link, else (another filesystem) a copy with a note."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    temporary = blobs.ingests / f"adopt-{uuid.uuid4().hex}"
    before = LinkRecord.of(path)
    note = ""
    try:
        if link:
            try:
                os.link(path.resolve(), temporary)
            except OSError as exc:
                link, note = False, f"{path} could not be linked ({exc.strerror}); it was copied"
        if link or reflink(path, temporary):
            digest = hash_file(temporary)
        else:
            note = note or f"{path} was copied: this filesystem cannot share blocks"
            digest = _copy(path, temporary)
        if LinkRecord.of(path) != before:
            raise CorruptData(f"{path} changed while it was read", hint="Wait until it is complete, then try again.")
        if blobs.claim(digest):
            return Blob(digest, before.size)
        if link:
            make_folder(links)
            replace(links / digest.removeprefix("sha256:"), msgspec.json.encode(before))
            sync_file(temporary)
            os.rename(temporary, blobs.path(digest))
            sync_folder(blobs.folder)
        else:
            blobs.publish(temporary, digest)
        return Blob(digest, before.size, note, str(path) if link else "")
    finally:
        temporary.unlink(missing_ok=True)


def _copy(path: Path, target: Path) -> str:
    running = hashlib.sha256()
    with path.open("rb") as source, target.open("wb") as copy:
        while chunk := source.read(1 << 20):
            running.update(chunk)
            copy.write(chunk)
    return "sha256:" + running.hexdigest()
