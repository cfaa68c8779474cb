"""What the store need not keep: blobs that nothing reaches, dead ingests, folders of models that are gone.

Whoever removes holds the index's lock, and each transfer's own lock while its files go.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pierhead.store import scratch
from pierhead.store.files import is_locked, remove_tree, seized, sync_folder
from pierhead.store.manifest import reachable

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")  # what files.replace leaves when its process dies
_PARTS = (".part", ".mark", ".done")


def find(root: Path, live: Iterable[str], before: float) -> list[Path]:
    """The files and folders below ``root`` that no manifest of ``live`` (digests) needs, and that are older.

    Temporary files beside the index and the pins are dead for whoever holds the index's lock, and so are folders of
    work that nobody has locked.
    """
    blobs = root / "blobs" / "sha256"
    models = {digest.removeprefix("sha256:") for digest in live}
    keep = models | needed(blobs, models)
    places = ((blobs, keep), (root / "links", keep), (root / "models", models), (root / "beside", models))
    old = [p for place, wanted in places for p in _children(place) if p.name not in wanted and changed(p) < before]
    old += scratch.dead(root)
    return old + [p for place in (root, root / "pins") for p in _children(place) if _TEMPORARY.fullmatch(p.name)]


def needed(blobs: Path, models: Iterable[str]) -> set[str]:
    """The hex digests of the blobs that these manifests (hex digests) need."""
    return {name for model in models for name in reachable(blobs / model)}


def remove(path: Path) -> None:
    """A file or a folder; what is gone already is no failure."""
    remove_tree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


# --- transfers that nobody goes on with -------------------------------------------------------------------------------


def dead_ingests(ingests: Path, before: float, *, partials: bool) -> list[Path]:
    """Lock files of transfers that no live process has and, unless ``partials``, in which nothing landed."""
    found: list[Path] = []
    for lock in ingests.glob("*.lock"):
        part = lock.with_suffix(".part")
        if is_locked(lock) or (not partials and changed(lock) >= before):
            continue
        if lock.name == "adopt.lock":
            found += [lock] if any(ingests.glob("adopt-*")) else []
        elif partials or not part.exists() or part.stat().st_size == 0:
            found.append(lock)  # a partial stays for a later pull to go on with, unless nothing has landed
    return found


def files_of(lock: Path) -> Iterator[Path]:
    """What belongs to a transfer, its lock file last."""
    if lock.name == "adopt.lock":
        yield from lock.parent.glob("adopt-*")
        return
    yield from lock.parent.glob(f".{lock.stem}.mark.*")
    yield from (p for p in (lock.with_suffix(s) for s in _PARTS) if p.exists())
    yield lock


def discard(locks: Iterable[Path]) -> None:
    """Remove dead transfers; one that somebody took up meanwhile stays."""
    folder = None
    for lock in locks:
        with seized(lock) as free:
            if free:
                folder = lock.parent
                for path in list(files_of(lock)):
                    path.unlink(missing_ok=True)
    if folder is not None:
        sync_folder(folder)


# --- sizes ------------------------------------------------------------------------------------------------------------


def freed(paths: Iterable[Path]) -> dict[Path, int]:
    """Bytes that removing all of these gives back, by path; none for what stays under another name (a user's file)."""
    links: dict[tuple[int, int], int] = {}
    last: dict[tuple[int, int], tuple[int, int, Path]] = {}
    chosen = list(paths)
    for path in chosen:
        for file in path.rglob("*") if path.is_dir() and not path.is_symlink() else (path,):
            with contextlib.suppress(FileNotFoundError):
                found = file.lstat()
                inode = (found.st_dev, found.st_ino)
                links[inode] = links.get(inode, 0) + 1
                last.setdefault(inode, (found.st_nlink, found.st_blocks * 512, path))
    result = dict.fromkeys(chosen, 0)
    for inode, (count, size, path) in last.items():
        if links[inode] >= count:
            result[path] += size
    return result


def changed(path: Path) -> float:
    """When a file got its name or was claimed; never for one that is gone."""
    try:
        return path.lstat().st_ctime
    except FileNotFoundError:
        return float("inf")


def _children(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []
