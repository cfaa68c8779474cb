"""The collector: forgets what should be forgotten, then removes what nothing needs; may be killed at any step.

The index is written first, so that it never points to what is gone. Everything is decided and removed under the
index's lock: names, pins and claims either come before, and count, or come after, and find the blob missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from pierhead.store import garbage
from pierhead.store.blobs import Blobs
from pierhead.store.files import locked, os_errors
from pierhead.store.index import Descriptor, Index
from pierhead.store.keep import Keep
from pierhead.store.manifest import reachable
from pierhead.store.model import Pruned
from pierhead.store.names import Names


class Cleaner:
    """Removes garbage from one store."""

    def __init__(self, root: Path, blobs: Blobs, names: Names, keep: Keep, step: Callable[[str], None]) -> None:
        self._root = root
        self._blobs = blobs
        self._names = names
        self._keep = keep
        self._step = step

    def run(self, *, keep: int | None, partials: bool = False, dry_run: bool = False) -> Pruned:
        """Remove garbage; ``keep`` of each name's earlier versions stay, all of them for None."""
        if dry_run:
            return self._look(self._names.read(), keep, partials, dry_run=True)[0]
        with os_errors("cannot clean up the store"), locked(self._names.lock):
            index = self._names.read()
            before = msgspec.json.encode(index)
            report, paths, locks = self._look(index, keep, partials)
            self._names.write(index, before)
            self._step("collect:index")
            for path in paths:
                garbage.remove(path)
                self._step("collect:removed")
            garbage.discard(locks)
        return report

    def _look(
        self, index: Index, keep: int | None, partials: bool, *, dry_run: bool = False
    ) -> tuple[Pruned, list[Path], list[Path]]:
        """Take what must go out of ``index``; the report, the files to remove and the dead transfers."""
        forgotten = _forget(index, keep)
        pins = self._keep.pins()
        live = index.live(pins)
        horizon = self._keep.horizon()
        # what is said about a model may come before the model itself
        said = [e for e in index.manifests if e.subject]
        live |= {e.digest for e in said if horizon <= garbage.changed(self._blobs.path(e.digest)) < float("inf")}
        index.manifests = [e for e in index.manifests if e.digest in live]
        paths = garbage.find(self._root, live, horizon)
        locks = garbage.dead_ingests(self._blobs.ingests, horizon, partials=partials)
        sizes = garbage.freed(paths)
        parts = sum(garbage.freed([f for lock in locks for f in garbage.files_of(lock)]).values())
        models = self._shares(forgotten, sizes)
        total = sum(sizes.values())
        report = Pruned(
            freed=total + parts,
            models=models,
            unnamed=total - sum(models.values()),
            partials=parts,
            dry_run=dry_run,
        )
        return report, paths, locks

    def _shares(self, forgotten: Iterable[Descriptor], sizes: dict[Path, int]) -> dict[str, int]:
        """The bytes that go with each earlier version; what two share counts for the first."""
        left = {path.name: size for path, size in sizes.items() if path.parent == self._blobs.folder}
        found: dict[str, int] = {}
        for entry in forgotten:
            manifest = self._blobs.path(entry.digest)
            parts = {manifest.name, *reachable(manifest)}
            found[f"{entry.previous}@{entry.digest}"] = sum(left.pop(part, 0) for part in parts)
        return found

    def discard_partials(self) -> int:
        """Remove what interrupted transfers left; bytes freed."""
        with os_errors("cannot clean up the store"), locked(self._names.lock):
            locks = garbage.dead_ingests(self._blobs.ingests, 0, partials=True)
            freed = sum(garbage.freed([f for lock in locks for f in garbage.files_of(lock)]).values())
            garbage.discard(locks)
        return freed


def _forget(index: Index, keep: int | None) -> list[Descriptor]:
    """The earlier versions that went, the oldest last."""
    if keep is None:
        return []
    before = [e for e in reversed(index.manifests) if e.previous]
    index.trim({e.previous for e in before}, keep)
    left = {id(e) for e in index.manifests}
    return [e for e in before if id(e) not in left]
