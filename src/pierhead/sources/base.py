"""What a source is: it plans a reference into files and streams one file into a sink; knows no store and no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pierhead.formats.reading import File
from pierhead.refs import Reference
from pierhead.store.media import format_of
from pierhead.store.model import Role


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch: ``name`` inside the model's folder, ``size`` in bytes where known.

    ``digest`` (``sha256:…``) is what the source promises, ``key`` names the transfer (two pulls with one key share
    it; no secrets in it), ``local`` is a file on this machine to take in instead, ``opaque`` the source's own.
    ``format`` is that of weights, where it is not what the name tells; ``packing`` that of an archive.
    ``beneath`` is another program's folder that holds ``local``: no link below it is followed. ``data`` is the whole
    content of a file that the source makes itself.
    """

    name: str
    key: str
    size: int | None = None
    digest: str = ""
    role: Role = "weights"
    local: Path | None = None
    opaque: Any = None
    beneath: Path | None = None
    data: bytes | None = None
    format: str = ""
    packing: str = "raw"
    early: bool = True  # its beginning can be trusted to tell whether the rest is worth fetching

    def shaped(self) -> File:
        """The file as readers of headers see it."""
        return File(self.name, self.size, self.role, self.format or format_of(self.name))


@dataclass(frozen=True)
class PullPlan:
    """What a reference stands for now: ``source`` is pinned (a commit, a version) and holds no credentials."""

    name: str
    source: str
    files: tuple[RemoteFile, ...]
    annotations: dict[str, str] = field(default_factory=dict[str, str])
    manifest: bytes = b""  # of an artifact that is packaged already, kept to the byte
    config: bytes = b""

    @property
    def total(self) -> int:
        """Bytes of all files; 0 when one is unknown."""
        sizes = [f.size for f in self.files]
        return 0 if None in sizes else sum(s for s in sizes if s)


class Sink(Protocol):
    """Where the bytes of one file go; ``offset`` of them are there already."""

    @property
    def offset(self) -> int: ...

    async def write(self, data: bytes) -> None:
        """Append."""
        ...

    async def write_all(self, chunks: list[bytes]) -> None:
        """Append several pieces in one go."""
        ...

    async def restart(self) -> None:
        """Forget everything: the source cannot go on where it stopped."""
        ...

    async def checkpoint(self) -> None:
        """Make what has landed survive a power cut."""
        ...


class Source(Protocol):
    """One kind of place that models come from."""

    async def plan(self, reference: Reference) -> PullPlan:
        """Resolve and pin; NotFound, AccessDenied or SourceUnavailable when that cannot be done."""
        ...

    async def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """A part of a planned file; fewer bytes only at its end."""
        ...

    async def fetch(self, file: RemoteFile, sink: Sink) -> None:
        """Stream the file from ``sink.offset`` to its end, with retries; what landed stays when it fails."""
        ...

    async def forget(self, plan: PullPlan) -> None:
        """The plan is in the store: remove what was kept for it elsewhere."""
        ...
