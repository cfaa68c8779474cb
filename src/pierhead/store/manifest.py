"""OCI documents of a model, ours and strangers', read: the manifest, and what its config and store say with it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from pierhead.errors import CorruptData
from pierhead.store.index import Descriptor
from pierhead.store.layers import check_filepath, config_of, files_of
from pierhead.store.media import CREATED, MEMORY, SETTINGS, SOURCE
from pierhead.store.model import ModelFile, ModelRecord, Packaged

__all__ = [
    "MAX_DOCUMENT",
    "Manifest",
    "about_artifact",
    "check_filepath",
    "memory_of",
    "packaged_of",
    "reachable",
    "record",
]

MAX_DOCUMENT = 16 << 20
MAX_MEMORY = 4096  # characters


class Manifest(msgspec.Struct, rename="camel", omit_defaults=True):
    """An OCI image manifest that carries a model."""

    media_type: str
    config: Descriptor
    layers: list[Descriptor]
    schema_version: int = msgspec.field(default=2)
    artifact_type: str = ""
    subject: Descriptor | None = None
    annotations: dict[str, str] = {}


def record(
    digest: str, name: str, names: tuple[str, ...], blob_path: Callable[[str], Path], beside: dict[str, Any]
) -> ModelRecord:
    """Read a model's manifest and config; CorruptData when they are not what they should be.

    ``beside`` is what this store found out about an artifact that others made: ``summary`` and ``source``.
    """
    try:
        found = msgspec.json.decode(_read(blob_path(digest)), type=Manifest)
        config = msgspec.json.decode(_read(blob_path(found.config.digest)), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise CorruptData(
            f"the manifest of '{name}' is damaged: {exc}", hint="Type `pier fsck --repair`, then pull it again."
        ) from exc
    summary = beside.get("summary") or config.get("ai.pierhead.summary")
    return ModelRecord(
        name=name,
        names=names,
        digest=digest,
        size=sum(layer.size for layer in found.layers),
        created=found.annotations.get(CREATED, ""),
        files=files_of(found.layers, config),
        metadata=summary if isinstance(summary, dict) else {},  # pyright: ignore[reportUnknownArgumentType]
        source=str(beside["source"] if "source" in beside else found.annotations.get(SOURCE, "")),
        annotations=found.annotations,
        config_type=found.config.media_type,
        packaged=packaged_of(found, config, summary),
        unpacked=_unpacked(beside),
        memory=memory_of(found),
    )


def packaged_of(found: Manifest, config: dict[str, Any], summary: Any) -> Packaged:
    """How the model is to run. Docker's context size counts where it is not just what the model was trained for."""
    packaged = Packaged()
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        packaged = msgspec.json.decode(found.annotations.get(SETTINGS) or "{}", type=Packaged)
    about = config.get("config")
    asked = cast("dict[str, Any]", about).get("context_size") if isinstance(about, dict) else None
    trained = cast("dict[str, Any]", summary).get("context_length") if isinstance(summary, dict) else None
    if not packaged.context and type(asked) is int and 0 < asked < 1 << 31 and asked != trained:
        packaged = msgspec.structs.replace(packaged, context=asked)
    return packaged


def memory_of(found: Manifest) -> dict[str, Any]:
    """What the weights' layers tell of the memory that the model needs: bytes and words, by name; empty for nothing."""
    for layer in found.layers:
        told = layer.annotations.get(MEMORY, "")
        if told and len(told) <= MAX_MEMORY:
            with contextlib.suppress(msgspec.DecodeError, RecursionError):
                return dict(msgspec.json.decode(told, type=dict[str, int | str]))
    return {}


def about_artifact(manifest: bytes, config: bytes, summary: dict[str, Any]) -> dict[str, Any]:
    """What a manifest and its config tell by themselves, JSON-safe: ``digest``, ``layers``, ``files``, ``memory``, …"""
    found, about = msgspec.json.decode(manifest, type=Manifest), config_of(config)
    return {
        "digest": "sha256:" + hashlib.sha256(manifest).hexdigest(),
        "annotations": found.annotations,
        "config_type": found.config.media_type,
        "layers": [{"media_type": x.media_type, "digest": x.digest, "size": x.size} for x in found.layers],
        "files": msgspec.to_builtins(files_of(found.layers, about)),
        "packaged": msgspec.to_builtins(packaged_of(found, about, summary)),
        "memory": memory_of(found),
    }


def _unpacked(beside: dict[str, Any]) -> tuple[ModelFile, ...]:
    try:
        return msgspec.convert(beside.get("unpacked") or (), tuple[ModelFile, ...])
    except msgspec.ValidationError:
        return ()


def unreadable(digest: str, name: str, names: tuple[str, ...], why: str) -> ModelRecord:
    """What is left to tell of a model whose documents are damaged or gone."""
    return ModelRecord(name=name, names=names, digest=digest, size=0, created="", files=(), metadata={}, damaged=why)


def reachable(manifest: Path) -> set[str]:
    """The hex digests of the blobs that a manifest needs; empty when it is not there or not one."""
    with contextlib.suppress(OSError, msgspec.DecodeError, RecursionError, CorruptData):
        found = msgspec.json.decode(_read(manifest), type=Manifest)
        return {d.digest.removeprefix("sha256:") for d in (found.config, *found.layers)}
    return set()


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_DOCUMENT:
        raise CorruptData(f"{path.name[:12]} is larger than a manifest may be")
    return path.read_bytes()
