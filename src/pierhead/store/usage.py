"""Where the store's bytes are; measures and changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from pierhead.store.blobs import Blobs
from pierhead.store.files import disk_bytes
from pierhead.store.link import LinkRecord
from pierhead.store.model import ModelRecord, Usage


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
