"""The check of a whole store: is what the index names there, and has it its digest; what is damaged can be put away.

A blob that is there counts as good for pulls. So a damaged one has to go before a pull fetches it again; a name whose
documents are damaged has to go too. Nothing sound is removed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from pierhead.errors import CorruptData, PierError
from pierhead.store.blobs import Blobs
from pierhead.store.files import locked, os_errors, remove_tree, sync_folder
from pierhead.store.index import Descriptor, Index
from pierhead.store.link import LinkRecord, hash_file
from pierhead.store.manifest import Manifest, reachable
from pierhead.store.names import Names

Kind = Literal["missing", "truncated", "damaged", "changed"]
Report = Callable[[str, int, int], None]


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """One blob that is not what it should be, and who needs it; ``changed``: a linked file of the user's."""

    kind: Kind
    digest: str
    names: tuple[str, ...]  # NAME, or NAME@sha256:… for earlier versions
    document: bool  # a manifest or config: the model cannot even be read
    source: str = ""  # where a model that needs it came from


class Checker:
    """Checks one store, and puts away what is damaged."""

    def __init__(self, root: Path, blobs: Blobs, names: Names) -> None:
        self._root = root
        self._blobs = blobs
        self._names = names

    def look(self, report: Report, *, quick: bool) -> list[Damage]:
        """What is wrong; ``quick`` compares sizes and does not hash. ``report`` hears (digest, blobs done, of all)."""
        index = self._names.read()
        wanted: dict[str, int] = {}
        users: dict[str, dict[str, None]] = {}
        documents: set[str] = set()
        for entry in index.manifests:
            for digest, size, document in self._parts(entry):
                wanted.setdefault(digest, size)
                users.setdefault(digest, {})[_called(entry)] = None
                documents |= {digest} if document else set()
        found: list[Damage] = []
        for number, (digest, size) in enumerate(wanted.items()):
            report(digest, number, len(wanted))
            kind = self._state(digest, size, quick)
            if kind is not None:
                names = tuple(users[digest])
                found.append(
                    Damage(
                        kind=kind,
                        digest=digest,
                        names=names,
                        document=digest in documents,
                        source=self._source(index, names),
                    )
                )
        return found

    def _parts(self, entry: Descriptor) -> list[tuple[str, int, bool]]:
        """Digest, size and whether it is a document, of an entry's manifest and all that it names."""
        parts = [(entry.digest, entry.size, True)]
        try:
            found = msgspec.json.decode(self._blobs.path(entry.digest).read_bytes(), type=Manifest)
        except (OSError, msgspec.DecodeError):
            return parts
        parts.append((found.config.digest, found.config.size, True))
        return parts + [(layer.digest, layer.size, False) for layer in found.layers]

    def _state(self, digest: str, size: int, quick: bool) -> Kind | None:
        path = self._blobs.path(digest)
        with os_errors(f"cannot read {path}"):
            if not path.is_file():
                return "missing"
            try:
                LinkRecord.check(self._root / "links", digest)
            except CorruptData:
                return "changed"
            if path.stat().st_size != size:
                return "truncated"
            return None if quick or hash_file(path) == digest else "damaged"

    def _source(self, index: Index, names: tuple[str, ...]) -> str:
        for name in (n.partition("@sha256:")[0] for n in names):
            current = next((e.digest for e in index.named if e.name == name), "")
            for move in self._names.history.of(name, current):
                if move.source and move.by in ("pull", "import"):
                    return move.source
        return ""

    def put_away(self, damage: list[Damage]) -> None:
        """Remove damaged blobs, and the names of models that cannot be read; sound blobs stay."""
        bad = {d.digest for d in damage}
        unreadable = {d.digest for d in damage if d.document}
        with os_errors("cannot repair the store"), locked(self._names.lock):
            index = self._names.read()
            before = msgspec.json.encode(index)
            lost = [e for e in index.manifests if unreadable & {p[0] for p in self._parts(e) if p[2]}]
            for entry in lost:
                if entry.name:
                    self._names.history.add(entry.name, "", was=entry.digest, by="fsck")
            index.manifests = [e for e in index.manifests if e not in lost]
            self._names.write(index, before)
            hexes = {digest.removeprefix("sha256:") for digest in bad}
            for folder in (self._root / "models").iterdir():
                if hexes & {folder.name, *reachable(self._blobs.folder / folder.name)}:
                    remove_tree(folder)
            for name in hexes:
                (self._blobs.folder / name).unlink(missing_ok=True)
                (self._root / "links" / name).unlink(missing_ok=True)
            sync_folder(self._blobs.folder)


def _called(entry: Descriptor) -> str:
    """Who an entry of the index is, for people."""
    if entry.name:
        return entry.name
    return f"{entry.previous}@{entry.digest}" if entry.previous else f"a statement about {entry.subject[:19]}"


def advice(damage: Damage) -> str:
    """The command that mends it."""
    name = damage.names[0].partition("@sha256:")[0] if damage.names else ""
    if damage.source:
        return f"pier pull {damage.source} --name {name}"
    return f"pier pull {name}" if name and not name.startswith("a statement") else "pier prune"


def worst(damage: list[Damage]) -> PierError:
    """The error that a check ends with."""
    count = len(damage)
    return CorruptData(
        f"{count} blob{'s are' if count != 1 else ' is'} not what {'they' if count != 1 else 'it'} should be",
        hint="Type `pier fsck --repair`, then the commands that it shows.",
        data={"damage": msgspec.to_builtins(damage)},
    )
