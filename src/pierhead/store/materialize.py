"""A model's files laid out in a read-only folder under their own names; archives are unpacked, nothing leaves it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from pierhead.errors import CorruptData, OutOfSpace
from pierhead.store.classify import classify
from pierhead.store.files import reflink, remove_tree, sync_folder
from pierhead.store.model import ModelFile
from pierhead.store.tar import Archive, Member, opened, refuse


def lay_out(
    files: Sequence[ModelFile], blob_path: Callable[[str], Path], target: Path, step: Callable[[str], None]
) -> None:
    """Fill the folder ``target`` in one step; nothing happens where it is there already.

    CorruptData where two files have one name (or names that differ in case alone), or an archive holds what it must
    not. Raises OSError when the disk refuses.
    """
    temporary = target.with_name(f".{uuid.uuid4().hex}")
    try:
        os.mkdir(temporary, 0o755)
        room = _Room(temporary)
        for file in files:
            if file.packing == "raw":
                _share(blob_path(file.digest), room.place(file.name))
            else:
                _unpack(file, blob_path(file.digest), room)
        for folder, _, _ in os.walk(temporary, topdown=False):
            sync_folder(Path(folder))
        step("materialize:filled")
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():  # somebody else was first
            raise
    finally:
        remove_tree(temporary)


def unpacked(files: Sequence[ModelFile], folder: Path) -> tuple[ModelFile, ...]:
    """The files of a folder that was laid out that came from archives."""
    own = {file.name for file in files if file.packing == "raw"}
    found: list[ModelFile] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in own:
            role, format = classify(name)
            found.append(ModelFile(name, path.stat().st_size, role, format=format))
    return tuple(found)


class _Room:
    """The folder that is filled: each name once, whatever its case, and no file where a folder is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[str, str] = {}  # folded name → "file" or a folder's exact name
        self._made: set[str] = set()

    def place(self, name: str) -> Path:
        """Where a file goes; its folders are made."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        self.make("/".join(parts[:-1]))
        exact = "/".join(parts)
        if exact.casefold() in self._names:
            raise CorruptData(f"the model has two files of one name: {exact[:100]!r}")
        self._names[exact.casefold()] = "file"
        return self.folder / exact

    def make(self, name: str) -> None:
        """A folder and those above it."""
        exact = ""
        for part in name.split("/") if name else ():
            exact = f"{exact}/{part}" if exact else part
            known = self._names.setdefault(exact.casefold(), exact)
            if known != exact:
                raise CorruptData(f"the model has two files of one name: {exact[:100]!r}")
            if exact not in self._made:
                self._made.add(exact)
                os.mkdir(self.folder / exact, 0o755)

    def check_space(self, size: int) -> None:
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        if size > free:
            raise OutOfSpace(
                f"the disk has {free:,} bytes free, unpacking the model needs {size:,} more",
                hint="Free some space (`pier df`, `pier rm NAME`), then try again.",
                data={"needed": size, "free": free},
            )


def _unpack(file: ModelFile, blob: Path, room: _Room) -> None:
    with blob.open("rb") as packed:
        archive = Archive(opened(packed, file.packing, file.size))
        for member in archive:
            if member.is_folder:
                room.make(member.path)
            else:
                _write(archive, member, room, file)


def _write(archive: Archive, member: Member, room: _Room, file: ModelFile) -> None:
    if file.packing == "tar" and member.size > file.size:
        refuse(f"{member.path[:100]!r} claims to be larger than its archive")
    room.check_space(member.size)
    place = room.place(member.path)
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb", buffering=0) as out:
        for chunk in archive.data():
            view = memoryview(chunk)
            while view:
                view = view[out.write(view) :]
        os.fchmod(out.fileno(), 0o555 if member.executable else 0o444)
        os.fsync(out.fileno())


def _share(blob: Path, place: Path) -> None:
    try:
        os.link(blob, place)
    except OSError:
        if not reflink(blob, place):
            shutil.copyfile(blob, place)
        place.chmod(0o444)
