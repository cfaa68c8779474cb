"""Where the store's bytes are; measures and changes nothing."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

from pierhead.store.blobs import Blobs
from pierhead.store.files import disk_bytes
from pierhead.store.index import Index
from pierhead.store.link import LinkRecord
from pierhead.store.manifest import reachable
from pierhead.store.model import ModelRecord, Usage


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a model: ``unique`` are needed by it alone, ``shared`` by others too, ``linked`` are a user's files."""

    name: str  # NAME@sha256:… for an earlier version
    names: tuple[str, ...]
    digest: str
    size: int
    unique: int
    shared: int
    linked: int


def shares(index: Index, blobs: Blobs) -> list[Share]:
    """What each manifest of the index weighs; removing one gives back what is unique to it and not linked."""
    names: dict[str, list[str]] = {}
    for entry in index.manifests:
        if entry.name or entry.previous:
            called = [entry.name] if entry.name else []
            names.setdefault(entry.digest, []).extend(called)
    parts = {digest: {blobs.path(digest).name, *reachable(blobs.path(digest))} for digest in names}
    users = Counter(part for found in parts.values() for part in found)
    earlier = {e.digest: f"{e.previous}@{e.digest}" for e in index.manifests if e.previous}
    found: list[Share] = []
    for digest, own in parts.items():
        sizes = {part: status.st_size for part in own if (status := _status(blobs.folder / part))}
        linked = sum(sizes[part] for part in sizes if (blobs.folder.parent.parent / "links" / part).exists())
        unique = sum(size for part, size in sizes.items() if users[part] == 1)
        total = sum(sizes.values())
        name = names[digest][0] if names[digest] else earlier[digest]
        found.append(
            Share(
                name=name,
                names=tuple(names[digest]),
                digest=digest,
                size=total,
                unique=unique,
                shared=total - unique,
                linked=linked,
            )
        )
    return sorted(found, key=lambda share: share.name)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def measure(root: Path, blobs: Blobs, models: Iterable[ModelRecord], reclaimable: int) -> Usage:
    """Allocated bytes below ``root`` by what they are for."""
    seen: set[tuple[int, int]] = set()
    content = disk_bytes(blobs.folder, seen)
    ingests = disk_bytes(blobs.ingests, seen)
    materialized = disk_bytes(root / "models", seen)
    rest = disk_bytes(root, seen)
    return Usage(
        total=content + ingests + materialized + rest,
        blobs=content,
        ingests=ingests,
        materialized=materialized,
        reclaimable=reclaimable,
        linked_outside=LinkRecord.total(root / "links", blobs),
        free=shutil.disk_usage(root).free,
        models={r.name: r.size for r in models},
    )
