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

TOLD = 64_000_000  # bytes from which a copy, where there could be none, is worth a word


class LinkRecord(msgspec.Struct, frozen=True):
    """What a linked file looked like when it was hashed; times in nanoseconds."""

    path: str
    inode: int
    size: int
    mtime: int

    @classmethod
    def of(cls, path: Path, shown: str = "") -> LinkRecord:
        found = path.stat()
        return cls(shown or str(path), found.st_ino, found.st_size, found.st_mtime_ns)

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
        if (now.inode, now.size, now.mtime) == (kept.inode, kept.size, kept.mtime):
            return
        touched = (now.inode, now.size) == (kept.inode, kept.size)
        if touched and hash_file(blob) == digest:  # only its time moved, as Ollama does to layers that it reuses
            with contextlib.suppress(OSError):
                replace(folder / blob.name, msgspec.json.encode(msgspec.structs.replace(kept, mtime=now.mtime)))
        else:
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


def adopt(blobs: Blobs, links: Path, path: Path, *, link: bool, expected: str = "", shown: str = "") -> Blob:
    """Reflink, else copy while hashing; with ``link`` a hard link, else (another filesystem) a copy with a note.

    ``expected`` is the digest that it must have, ``shown`` what messages call a file whose path tells nothing.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    temporary = blobs.ingests / f"adopt-{uuid.uuid4().hex}"
    before = LinkRecord.of(path, shown)
    note = ""
    try:
        if link:
            note = _hard_link(path, temporary, before)
            link = not note
        if link or reflink(path, temporary):
            digest = hash_file(temporary)
        else:
            if not note and before.size >= TOLD:
                note = f"{before.path} was copied, as this filesystem cannot share blocks; --link makes a hard link"
            digest = _copy(path, temporary)
        if LinkRecord.of(path, shown) != before:
            raise CorruptData(
                f"{before.path} changed while it was read", hint="Wait until it is complete, then try again."
            )
        if expected and digest != expected:
            raise CorruptData(
                f"{before.path} has digest {digest}, expected {expected}",
                hint="It is damaged: fetch it again with the tool whose file it is.",
            )
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
        return Blob(digest, before.size, note, before.path if link else "")
    finally:
        temporary.unlink(missing_ok=True)


def _hard_link(path: Path, target: Path, record: LinkRecord) -> str:
    """Make ``target`` the same inode; why that cannot be, when it cannot."""
    if os.geteuid() not in (0, path.stat().st_uid):  # nobody else can touch it, which claiming a blob does
        return f"{record.path} belongs to another user and was copied, not linked"
    try:
        os.link(path.resolve(), target)
    except OSError as exc:
        return f"{record.path} could not be linked ({exc.strerror}); it was copied"
    if target.stat().st_ino != record.inode:
        target.unlink()
        raise CorruptData(f"{record.path} was replaced while it was read", hint="Try again.")
    return ""


def _copy(path: Path, target: Path) -> str:
    running = hashlib.sha256()
    with path.open("rb") as source, target.open("wb") as copy:
        while chunk := source.read(1 << 20):
            running.update(chunk)
            copy.write(chunk)
    return "sha256:" + running.hexdigest()
