"""What the store knows about a model: plain frozen records; reads and writes nothing."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["weights", "mmproj", "lora", "draft", "template", "license", "config", "doc", "code", "dataset", "other"]


class ModelFile(msgspec.Struct, frozen=True):
    """One file of a model: its name inside the read-only model folder, size in bytes, and role.

    ``format`` is that of weights (gguf, safetensors, onnx, dduf); ``packing`` other than ``raw`` is an archive whose
    members are the files, by their own names in the model folder. ``scale`` is how strongly a LoRA counts.
    """

    name: str
    size: int
    role: Role = "weights"
    digest: str = ""
    format: str = ""
    packing: str = "raw"
    media_type: str = ""
    scale: float = 1.0


class Blob(msgspec.Struct, frozen=True):
    """A blob that is in the store: ``digest`` is ``sha256:<64 hex>``, ``size`` in bytes; ``note`` says what to know."""

    digest: str
    size: int
    note: str = ""
    linked: str = ""  # the user's file that this blob is a hard link of


class Layer(msgspec.Struct, frozen=True):
    """One layer of a model to commit; ``filepath`` is the relative path inside the model folder."""

    digest: str
    size: int
    media_type: str
    filepath: str
    role: Role | None = None  # worked out from the media type when left out
    annotations: dict[str, str] = {}


class Packaged(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a model was packaged with: how it is to run unless somebody asks for something else.

    ``context`` in tokens (0: not said), ``options`` by engine parameter, ``system`` and ``messages`` begin every chat.
    """

    context: int = 0
    options: dict[str, Any] = {}
    system: str = ""
    messages: tuple[dict[str, str], ...] = ()


def opening(packaged: Packaged) -> tuple[dict[str, str], ...]:
    """The messages that begin every chat."""
    system = ({"role": "system", "content": packaged.system},) if packaged.system else ()
    return (*system, *packaged.messages)


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A committed model: ``digest`` is its manifest's, ``size`` the bytes of its files, ``created`` ISO 8601 UTC.

    An earlier version of a name has no ``names`` and is called ``NAME@sha256:…``.
    """

    name: str
    names: tuple[str, ...]
    digest: str
    size: int
    created: str
    files: tuple[ModelFile, ...]
    metadata: dict[str, Any]
    source: str = ""
    annotations: dict[str, str] = {}
    config_type: str = ""  # the media type of its config: which specification it follows
    damaged: str = ""  # why nothing else of it can be told; only in lists, for `get` raises it
    packaged: Packaged = Packaged()
    memory: dict[str, Any] = {}  # what its weights' layers say that it needs (``store.documents.memory_annotation``)
    unpacked: tuple[ModelFile, ...] = ()  # the members of those of its files that are archives

    @property
    def plain(self) -> str:
        """Its name, also of an earlier version without the digest."""
        return self.name.partition("@sha256:")[0] or self.name

    @property
    def adapter(self) -> bool:
        """Whether it is a LoRA of its own, which only adds to a model."""
        roles = {f.role for f in self.files}
        return "lora" in roles and "weights" not in roles

    @property
    def laid_out(self) -> tuple[ModelFile, ...]:
        """The files as they are in the model's folder."""
        return (*(f for f in self.files if f.packing == "raw"), *self.unpacked)


class Referrer(msgspec.Struct, frozen=True):
    """A manifest about a model: a signature, an SBOM, provenance."""

    digest: str
    size: int
    artifact_type: str


class Removed(msgspec.Struct, frozen=True):
    """What ``remove`` did: the names that are gone and the bytes that the disk got back.

    ``kept`` are bytes that other names, pins or leases still need, and ``user_linked`` bytes that stay on disk
    because a file outside the store is the same inode.
    """

    names: tuple[str, ...]
    freed_bytes: int
    kept: int = 0
    user_linked: int = 0


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What ``prune`` removed, or would remove: bytes that the disk got back, in all and by what they belonged to.

    ``models`` are earlier versions (``NAME@sha256:…``) and their own bytes; 0 where all of them are shared.
    """

    freed: int
    models: dict[str, int] = {}
    unnamed: int = 0  # blobs and folders that no name reached
    partials: int = 0  # what interrupted transfers left
    dry_run: bool = False


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Disk use in bytes (allocated blocks, each inode counted once)."""

    total: int  # everything below the store's folder
    blobs: int  # committed content
    ingests: int  # partial downloads
    materialized: int  # model folders' own bytes, beyond what they share with blobs
    reclaimable: int  # what collect() would free now
    linked_outside: int  # of blobs, bytes that are also a user's own file (removing frees nothing)
    free: int  # left on this filesystem for this user
    models: dict[str, int] = {}  # apparent size of each model by its first name
