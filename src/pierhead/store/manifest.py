"""OCI documents of a model: index, manifest and Docker's model config, written and (from strangers) read; no files."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from pierhead.errors import CorruptData
from pierhead.store.blobs import DIGEST
from pierhead.store.model import Blob, Layer, ModelFile, ModelRecord, Role

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.docker.ai.model.config.v0.1+json"
GGUF = "application/vnd.docker.ai.gguf.v3"
LORA = "application/vnd.docker.ai.gguf.v3.lora"
MMPROJ = "application/vnd.docker.ai.mmproj"
LICENSE = "application/vnd.docker.ai.license"
TEMPLATE = "application/vnd.docker.ai.chat.template.jinja"
FILE = "application/vnd.docker.ai.model.file"
FILEPATH = "org.cncf.model.filepath"
REF_NAME = "org.opencontainers.image.ref.name"
SOURCE = "ai.pierhead.source"
MAX_DOCUMENT = 16 << 20

CNCF = "application/vnd.cncf.model."
ROLES: dict[str, Role] = {
    f"{CNCF}weight.v1.raw": "weights",
    f"{CNCF}weight.config.v1.raw": "config",
    f"{CNCF}doc.v1.raw": "other",
    FILE: "other",
    GGUF: "weights",
    LORA: "lora",
    MMPROJ: "mmproj",
    LICENSE: "license",
    TEMPLATE: "template",
}
MEDIA: dict[Role, str] = {
    "weights": GGUF,
    "draft": GGUF,
    "lora": LORA,
    "mmproj": MMPROJ,
    "license": LICENSE,
    "template": TEMPLATE,
    "config": FILE,
    "other": FILE,
}


class Descriptor(msgspec.Struct, rename="camel", omit_defaults=True):
    """A pointer to a blob."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: dict[str, str] = {}

    @property
    def name(self) -> str:
        return self.annotations.get(REF_NAME, "")


class Index(msgspec.Struct, rename="camel"):
    """``index.json``: each entry a name and the manifest it points to."""

    schema_version: int = 2
    media_type: str = "application/vnd.oci.image.index.v1+json"
    manifests: list[Descriptor] = []

    def set(self, name: str, blob: Blob) -> None:
        """Point ``name`` to a manifest."""
        self.manifests = [e for e in self.manifests if e.name != name]
        self.manifests.append(Descriptor(MANIFEST, blob.digest, blob.size, CONFIG, {REF_NAME: name}))

    def find(self, name: str) -> tuple[str, str] | None:
        """The digest that a name, ``name:latest`` or an unambiguous digest prefix points to, and the exact name."""
        by_name = {e.name: e.digest for e in self.manifests}
        for wanted in (name, f"{name}:latest", name.removesuffix(":latest")):
            if wanted in by_name:
                return by_name[wanted], wanted
        if is_digest_like(name):
            wanted = name if name.startswith("sha256:") else f"sha256:{name}"
            found = {e.digest for e in self.manifests if e.digest.startswith(wanted)}
            return (found.pop(), "") if len(found) == 1 else None
        return None


class Manifest(msgspec.Struct, rename="camel", omit_defaults=True):
    """An OCI image manifest that carries a model."""

    media_type: str
    config: Descriptor
    layers: list[Descriptor]
    schema_version: int = msgspec.field(default=2)
    artifact_type: str = ""
    annotations: dict[str, str] = {}


def is_digest_like(name: str) -> bool:
    """Whether a user's word is a digest or the start of one."""
    return re.fullmatch(r"(?:sha256:[0-9a-f]{8,64}|[0-9a-f]{12,64})", name) is not None


def decode_index(data: bytes) -> Index:
    """Read ``index.json``; entries that are not ours to read are kept. msgspec.DecodeError when it is damaged."""
    index = msgspec.json.decode(data, type=Index)
    for entry in index.manifests:
        if not DIGEST.fullmatch(entry.digest):
            raise msgspec.ValidationError(f"not a digest: {entry.digest[:80]!r}")
    return index


def check_filepath(path: str) -> str:
    """Return a relative path that stays inside its folder; CorruptData for any other."""
    parts = PurePosixPath(path).parts
    odd = any(ord(c) < 32 or c in "\\\x7f" for c in path)
    if not path or odd or len(path) > 1024 or path.startswith("/") or ".." in parts or not parts:
        raise CorruptData(f"a file of the model has a path that leaves its folder: {path[:100]!r}")
    return path


def config_bytes(layers: Sequence[Layer], metadata: dict[str, Any]) -> bytes:
    """Docker's model config v0.1, with our summary of the header beside it."""
    about = {
        "format": str(metadata.get("format", "gguf")),
        "format_version": str(metadata.get("version", "")),
        "quantization": str(metadata.get("quantization") or ""),
        "parameters": str(metadata.get("parameters") or ""),
        "architecture": str(metadata.get("architecture") or ""),
        "size": str(sum(layer.size for layer in layers)),
    }
    document: dict[str, Any] = {
        "architecture": "unknown",
        "os": "unknown",
        "config": about,
        "descriptor": {},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        "ai.pierhead.summary": metadata,
    }
    return msgspec.json.encode(document)


def manifest_bytes(layers: Sequence[Layer], config: Blob, annotations: dict[str, str]) -> bytes:
    """The manifest; layers are uncompressed, so digest equals diffID."""
    entries = [
        Descriptor(x.media_type, x.digest, x.size, annotations={FILEPATH: x.filepath, **x.annotations}) for x in layers
    ]
    document = Manifest(MANIFEST, Descriptor(CONFIG, config.digest, config.size), entries, 2, CONFIG, annotations)
    raw = msgspec.to_builtins(document)
    return msgspec.json.encode({"schemaVersion": 2, **raw})


def record(
    digest: str, names: tuple[str, ...], blob_path: Callable[[str], Path], beside: dict[str, Any]
) -> ModelRecord:
    """Read a model's manifest and config; CorruptData when they are not what they should be.

    ``beside`` is what this store found out about an artifact that others made: ``summary`` and ``source``.
    """
    try:
        found = msgspec.json.decode(_read(blob_path(digest)), type=Manifest)
        config = msgspec.json.decode(_read(blob_path(found.config.digest)), type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise CorruptData(
            f"the manifest of '{names[0]}' is damaged: {exc}", hint=f"Type `pier rm {names[0]}` and pull it again."
        ) from exc
    files = tuple(
        ModelFile(
            check_filepath(layer.annotations.get(FILEPATH) or layer.digest.removeprefix("sha256:")),
            layer.size,
            ROLES.get(layer.media_type, "other"),
            layer.digest,
        )
        for layer in found.layers
    )
    summary = config.get("ai.pierhead.summary") or beside.get("summary")
    return ModelRecord(
        name=names[0],
        names=names,
        digest=digest,
        size=sum(f.size for f in files),
        created=found.annotations.get("org.opencontainers.image.created", ""),
        files=files,
        metadata=summary if isinstance(summary, dict) else {},  # pyright: ignore[reportUnknownArgumentType]
        source=str(beside.get("source") or found.annotations.get(SOURCE, "")),
        annotations=found.annotations,
    )


def reachable(manifest: Path) -> set[str]:
    """The hex digests of the blobs that a manifest needs; empty when it is not there or not one."""
    with contextlib.suppress(OSError, msgspec.DecodeError, CorruptData):
        found = msgspec.json.decode(_read(manifest), type=Manifest)
        return {d.digest.removeprefix("sha256:") for d in (found.config, *found.layers)}
    return set()


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_DOCUMENT:
        raise CorruptData(f"{path.name[:12]} is larger than a manifest may be")
    return path.read_bytes()
