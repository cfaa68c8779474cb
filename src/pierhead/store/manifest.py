"""OCI documents of a model: manifest and Docker's model config, written and (from strangers) read; no files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from pierhead.errors import CorruptData
from pierhead.store.index import Descriptor
from pierhead.store.media import CONFIG, CREATED, FILEPATH, MANIFEST, ROLE, SOURCE, TITLE, kind_of
from pierhead.store.model import Blob, Layer, ModelFile, ModelRecord

MAX_DOCUMENT = 16 << 20


class Manifest(msgspec.Struct, rename="camel", omit_defaults=True):
    """An OCI image manifest that carries a model."""

    media_type: str
    config: Descriptor
    layers: list[Descriptor]
    schema_version: int = msgspec.field(default=2)
    artifact_type: str = ""
    subject: Descriptor | None = None
    annotations: dict[str, str] = {}


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
        Descriptor(
            x.media_type, x.digest, x.size, annotations={FILEPATH: x.filepath, TITLE: x.filepath, **x.annotations}
        )
        for x in layers
    ]
    document = Manifest(
        MANIFEST,
        Descriptor(CONFIG, config.digest, config.size),
        entries,
        artifact_type=CONFIG,
        annotations=annotations,
    )
    raw = msgspec.to_builtins(document)
    return msgspec.json.encode({"schemaVersion": 2, **raw})


def record(
    digest: str, name: str, names: tuple[str, ...], blob_path: Callable[[str], Path], beside: dict[str, Any]
) -> ModelRecord:
    """Read a model's manifest and config; CorruptData when they are not what they should be.

    ``beside`` is what this store found out about an artifact that others made: ``summary`` and ``source``.
    """
    try:
        found = msgspec.json.decode(_read(blob_path(digest)), type=Manifest)
        config = msgspec.json.decode(_read(blob_path(found.config.digest)), type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise CorruptData(
            f"the manifest of '{name}' is damaged: {exc}", hint=f"Type `pier rm {name}` and pull it again."
        ) from exc
    files = tuple(_file(layer) for layer in found.layers)
    summary = config.get("ai.pierhead.summary") or beside.get("summary")
    return ModelRecord(
        name=name,
        names=names,
        digest=digest,
        size=sum(f.size for f in files),
        created=found.annotations.get(CREATED, ""),
        files=files,
        metadata=summary if isinstance(summary, dict) else {},  # pyright: ignore[reportUnknownArgumentType]
        source=str(beside.get("source") or found.annotations.get(SOURCE, "")),
        annotations=found.annotations,
        config_type=found.config.media_type,
    )


def _file(layer: Descriptor) -> ModelFile:
    path = check_filepath(layer.annotations.get(FILEPATH) or layer.digest.removeprefix("sha256:"))
    kind = kind_of(layer.media_type, path, layer.annotations.get(ROLE, ""))
    if kind is None:
        return ModelFile(path, layer.size, "other", layer.digest, media_type=layer.media_type)
    return ModelFile(path, layer.size, kind.role, layer.digest, kind.format, kind.packing, layer.media_type)


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
