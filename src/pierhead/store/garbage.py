"""What the store need not keep: blobs that nothing reaches, dead ingests, folders of models that are gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from pierhead.store.files import is_locked, sync_folder
from pierhead.store.manifest import reachable


def horizon(root: Path) -> float:
    """Unix time; what appeared later may be needed. Infinity without live leases; dead ones are removed."""
    oldest = float("inf")
    for path in (root / "leases").glob("*.lock"):
        if is_locked(path):
            with contextlib.suppress(FileNotFoundError):
                oldest = min(oldest, path.stat().st_mtime - 1)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return oldest


def find(root: Path, live: Iterable[str], before: float) -> list[Path]:
    """The files and folders below ``root`` that no manifest of ``live`` (digests) needs, and that are older."""
    blobs = root / "blobs" / "sha256"
    models = {digest.removeprefix("sha256:") for digest in live}
    keep = set(models)
    for name in models:
        keep |= reachable(blobs / name)
    places = ((blobs, keep), (root / "links", keep), (root / "models", models), (root / "beside", models))
    old = [p for place, wanted in places for p in _children(place) if p.name not in wanted and _changed(p) < before]
    for lock in (root / "ingest").glob("*.lock"):
        if not is_locked(lock) and _changed(lock) < before:
            # a partial stays for a later pull to go on with, unless nothing has landed
            data = lock.with_suffix(".part")
            if not data.exists() or data.stat().st_size == 0:
                old += [p for p in (data, *(lock.with_suffix(s) for s in (".mark", ".done")), lock) if p.exists()]
    return old


def discard_partials(ingests: Path) -> None:
    """Remove what interrupted pulls left. Pulls in progress keep theirs."""
    for lock in list(ingests.glob("*.lock")):
        if not is_locked(lock):
            for suffix in (".part", ".mark", ".done", ".lock"):
                lock.with_suffix(suffix).unlink(missing_ok=True)
    sync_folder(ingests)


def size(path: Path) -> int:
    """Bytes that removing ``path`` gives back; a model's folder is links to blobs, which are counted themselves."""
    if path.is_dir():
        return 0
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_ctime
    except FileNotFoundError:
        return float("inf")


def _children(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []
