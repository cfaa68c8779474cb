"""Models that are on this machine already: a file of weights, or a folder that holds one model."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Generator, Sequence
from pathlib import Path

from pierhead.errors import NotFound, UsageError
from pierhead.refs import Reference, default_name
from pierhead.sources.base import PullPlan, RemoteFile, Sink
from pierhead.sources.choose import Entry, choices
from pierhead.sources.select import Part, select
from pierhead.store.files import opened_beneath, os_errors
from pierhead.store.media import format_of

MAX_FILES = 10000


class Local:
    """The file system."""

    async def plan(self, reference: Reference) -> PullPlan:
        return await asyncio.to_thread(_plan, reference)

    async def forget(self, plan: PullPlan) -> None:
        """Nothing is kept outside of the store."""

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        return await asyncio.to_thread(read_local, file, offset, length)

    async def fetch(self, file: RemoteFile, sink: Sink) -> None:
        raise NotImplementedError("the store takes local files in itself")


def _plan(reference: Reference) -> PullPlan:
    path = Path(reference.path).expanduser().absolute()
    with os_errors(f"cannot read {path}"):
        if path.is_dir():
            root, chosen = path, _folder(path)
        elif path.is_file():
            root, chosen = path.parent, _one(path)
        elif path.exists():
            raise UsageError(f"{path} is neither a file nor a folder", hint="Name a model's file or folder.")
        else:
            raise NotFound(f"no such file or folder: {path}", hint="Check the path.")
        files = tuple(
            RemoteFile(
                name=part.name,
                key=str(root / part.entry.path),
                size=part.entry.size,
                role=part.role,
                local=root / part.entry.path,
                format=part.format,
            )
            for part in chosen
        )
    return PullPlan(default_name(reference), f"file:{path}", files)


def _one(path: Path) -> Sequence[Part]:
    """The file, with the other shards beside it where it is one of several."""
    entries = [Entry(p.name, p.stat().st_size) for p in path.parent.glob("*.gguf") if p.is_file()]
    for choice in choices(entries):
        if choice.shards > 1 and any(e.path == path.name for e in choice.entries):
            return select(choice.entries, "", str(path.parent)).parts
    return [Part(Entry(path.name, path.stat().st_size), path.name, "weights", format_of(path.name))]


def _folder(path: Path) -> Sequence[Part]:
    entries = _entries(path)
    found = choices(entries)
    if len(found) > 1:
        names = ", ".join(sorted(c.entries[0].path for c in found)[:20])
        raise UsageError(f"{path} holds several models: {names}", hint="Name one of the files.")
    return select(entries, "", str(path)).parts


def _entries(path: Path) -> list[Entry]:
    found: list[Entry] = []
    for number, (folder, folders, names) in enumerate(os.walk(path)):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if number > MAX_FILES or len(found) > MAX_FILES:
            raise UsageError(f"{path} holds too many files to be a model's folder", hint="Name one of its files.")
        for name in sorted(names):
            file = Path(folder) / name
            if not name.startswith(".") and file.is_file():
                found.append(Entry(file.relative_to(path).as_posix(), file.stat().st_size))
    return found


@contextlib.contextmanager
def opened(file: RemoteFile) -> Generator[Path]:
    """Where a file of this machine can be read; in another program's folder, through a handle that followed no link."""
    assert file.local is not None
    if file.beneath is None:
        yield file.local
        return
    with (
        os_errors(f"cannot read {file.local}"),
        opened_beneath(file.beneath, file.local.relative_to(file.beneath).as_posix()) as handle,
    ):
        yield Path(f"/proc/self/fd/{handle}")


def read_local(file: RemoteFile, offset: int, length: int) -> bytes:
    """A part of a file of this machine."""
    with opened(file) as path, os_errors(f"cannot read {file.local}"), path.open("rb") as reader:
        reader.seek(offset)
        return reader.read(length)
