"""Files on their way to a hub, read from where they lie in the store; copies nothing, knows no hub."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

from pierhead.errors import CorruptData
from pierhead.store.files import os_errors
from pierhead.store.layout import Store
from pierhead.store.link import hash_file
from pierhead.store.model import ModelRecord

BLOCK = 1 << 20
SAMPLE = 512  # bytes by which a hub tells text from data


@dataclass(frozen=True)
class Outgoing:
    """One file: ``path`` in the repository, its content in a file of the store or, if it was made here, in memory."""

    path: str
    size: int
    sha256: str
    file: Path | None = None
    data: bytes = b""

    def read(self, limit: int = -1) -> bytes:
        """The beginning, or all of it: for small files."""
        if self.file is None:
            return self.data if limit < 0 else self.data[:limit]
        with os_errors(f"cannot read {self.path}"), self.file.open("rb") as opened:
            return opened.read(limit)

    def git_sha1(self) -> str:
        """The id that git gives to the content."""
        data = self.read()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    async def stream(self, start: int, end: int, sent: Callable[[int], None]) -> AsyncGenerator[bytes]:
        """The bytes from ``start`` to ``end``; ``sent`` is told how many of them went."""
        if self.file is None:
            yield self.data[start:end]
            sent(end - start)
            return
        with os_errors(f"cannot read {self.path}"), self.file.open("rb", buffering=0) as opened:
            opened.seek(start)
            at = start
            while at < end:
                block = await asyncio.to_thread(opened.read, min(BLOCK, end - at))
                if not block:
                    raise CorruptData(
                        f"{self.path} is shorter than it was", hint="Type `pier pull` for the model again."
                    )
                yield block
                at += len(block)
                sent(at - start)


def of_bytes(path: str, data: bytes) -> Outgoing:
    """A file that was made here."""
    return Outgoing(path, len(data), hashlib.sha256(data).hexdigest(), None, data)


def files_of(store: Store, record: ModelRecord) -> list[Outgoing]:
    """The files of a model as they lie in its folder: blobs as they are, members of archives from where they are laid
    out."""
    found = [
        Outgoing(f.name, f.size, f.digest.removeprefix("sha256:"), store.blob_path(f.digest))
        for f in record.files
        if f.packing == "raw"
    ]
    if record.unpacked:
        folder = store.materialize(record)
        for member in record.unpacked:
            place = folder / member.name
            found.append(Outgoing(member.name, member.size, hash_file(place).removeprefix("sha256:"), place))
    return sorted(found, key=lambda f: f.path)
