"""The store: models as OCI artifacts in an image layout that other tools read; all calls block and are crash-safe.

Content becomes visible in one step: blobs by a rename, names by replacing ``index.json`` under a lock. What neither a
name nor one of its earlier versions reaches is garbage, and ``collect`` reclaims it unless a pin or a live lease may
still need it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pierhead.errors import CorruptData, NotFound
from pierhead.formats.gguf import read_file
from pierhead.formats.gguf_text import metadata_text
from pierhead.store import manifest as oci
from pierhead.store import removal
from pierhead.store.blobs import Blobs, Ingest, touch
from pierhead.store.cleaner import Cleaner
from pierhead.store.describe import describe
from pierhead.store.documents import About, write
from pierhead.store.files import disk_bytes, locked, make_folder, os_errors, replace
from pierhead.store.fsck import Checker, Damage
from pierhead.store.history import Move, now
from pierhead.store.index import Index
from pierhead.store.keep import Keep
from pierhead.store.link import LinkRecord, adopt, hash_file
from pierhead.store.materialize import lay_out
from pierhead.store.media import CREATED, SOURCE, Kind, kind_of
from pierhead.store.model import Blob, Layer, ModelFile, ModelRecord, Pruned, Referrer, Removed, Usage
from pierhead.store.names import Names, check_name
from pierhead.store.scratch import scratch
from pierhead.store.usage import Share, measure, shares


def _nothing(step: str) -> None:
    """Where tests stop a process; production does nothing."""


class Store:
    """The content-addressed OCI image layout below ``root``. Safe to use from many threads and processes."""

    def __init__(self, root: Path, step: Callable[[str], None] = _nothing) -> None:
        self.root = root
        self.step = step
        self.blobs = Blobs(root, step)
        self._names = Names(root, self.blobs, step)
        self._keep = Keep(root, self.blobs)
        self._cleaner = Cleaner(root, self.blobs, self._names, self._keep, step)

    @classmethod
    def open(cls, root: Path, step: Callable[[str], None] = _nothing) -> Store:
        """The store at ``root``, made if it is not there; a store that can only be read opens too."""
        store = cls(root, step)
        if (root / "index.json").exists() and store.blobs.folder.is_dir():
            return store
        with os_errors(f"cannot create the store in {root}"):
            for folder in (store.blobs.folder, store.blobs.ingests, *(root / n for n in ("models", "pins", "leases"))):
                make_folder(folder)
            store._names.create()
        return store

    # --- blobs ----------------------------------------------------------------------------------------------------

    def ingest(
        self,
        key: str,
        *,
        size: int | None = None,
        digest: str | None = None,
        waiting: Callable[[Path], None] | None = None,
    ) -> Ingest:
        """A blob on its way in, one process at a time per ``key``.

        ``waiting`` is called with the partial file, whose size shows the progress, when another process has the lock.
        """
        return Ingest(self.blobs, key, size=size, digest=digest, waiting=waiting)

    def adopt_file(self, path: Path, *, link: bool = False, digest: str = "", shown: str = "") -> Blob:
        """Take a user's file in: by reflink, else a copy; with ``link`` a hard link that ``recheck`` watches.

        ``digest`` is what it must have, ``shown`` what messages call it (a path below ``/proc`` tells nobody anything).
        """
        held = locked(self.blobs.ingests / "adopt.lock")
        with os_errors(f"cannot take {shown or path} into the store"), self.lease(), held:
            return adopt(self.blobs, self.root / "links", path, link=link, expected=digest, shown=shown)

    def has(self, digest: str) -> bool:
        return self.blobs.has(digest)

    def blob_path(self, digest: str) -> Path:
        """Where the blob is; NotFound when it is not there."""
        path = self.blobs.path(digest)
        if not path.is_file():
            raise NotFound(
                f"the store has no blob {digest}", hint="`pier fsck` shows what that concerns; pull it again."
            )
        return path

    # --- models ---------------------------------------------------------------------------------------------------

    def commit_model(
        self,
        name: str,
        *,
        layers: Sequence[Layer],
        metadata: dict[str, Any],
        annotations: dict[str, str] | None = None,
        by: str = "pull",
    ) -> ModelRecord:
        """Give a set of blobs a name, in one step. NotFound when a layer's blob is missing.

        ``by`` is the verb that the name's history will show.
        """
        check_name(name)
        for layer in layers:
            oci.check_filepath(layer.filepath)
            self.blob_path(layer.digest)
        told = dict(annotations or {})
        created = told.pop(CREATED, "") or now()
        files = [
            ModelFile(x.filepath, x.size, k.role, x.digest, k.format, k.packing, x.media_type)
            for x in layers
            if (k := kind_of(x.media_type, x.filepath, x.role or "") or Kind("other"))
        ]
        further = {x.digest: x.annotations for x in layers if x.annotations}
        about = About(metadata, created, annotations=told, header=self.header_text(files), name=name, layers=further)
        made = write("docker-v0.1" if metadata.get("format", "gguf") == "gguf" else "docker-v0.2", files, about)
        return self.commit_artifact(name, made.manifest, made.config, {"source": told.get(SOURCE, "")}, by=by)

    def header_text(self, files: Sequence[ModelFile]) -> dict[str, str]:
        """The metadata of the first of GGUF weights, as text."""
        weights = sorted((f.name, f.digest) for f in files if f.role == "weights" and f.format == "gguf")
        with contextlib.suppress(CorruptData):  # whoever commits has looked at it already
            return metadata_text(read_file(self.blob_path(weights[0][1]))) if weights else {}
        return {}

    def commit_artifact(
        self,
        name: str,
        manifest: bytes,
        config: bytes,
        beside: dict[str, Any],
        *,
        by: str = "pull",
        aside: bool = False,
    ) -> ModelRecord:
        """Give a model that others packaged a name; its documents stay as they are, to the byte.

        ``beside`` (``summary``, ``source``) is kept next to it. ``aside``: it becomes ``NAME@digest``, and the name
        goes on to mean what it means. NotFound when a layer's blob is missing.
        """
        check_name(name)
        document = msgspec.json.decode(manifest, type=oci.Manifest)
        with os_errors("cannot commit the model"), self.lease():
            if self.blobs.put(config).digest != document.config.digest:
                raise CorruptData(f"the config of '{name}' is not the one that its manifest names")
            for layer in document.layers:
                self.blob_path(layer.digest)
            self.step("model:config")
            stored = self.blobs.put(manifest)
            self.step("model:manifest")
            make_folder(self.root / "beside")
            replace(self._beside(stored.digest), msgspec.json.encode(beside))
            kind = document.artifact_type or document.config.media_type
            if aside:
                self._names.set_aside(name, stored, kind)
                return self.get(f"{name}@{stored.digest}")
            self._names.point(name, stored, by=by, source=str(beside.get("source") or ""), artifact_type=kind)
        return self.get(name)

    def _beside(self, digest: str) -> Path:
        return self.root / "beside" / self.blobs.path(digest).name

    def models(self) -> list[ModelRecord]:
        """All models, each once, by first name; of one that cannot be read, its names and why."""

        def read(index: Index) -> list[ModelRecord]:
            names: dict[str, list[str]] = {}
            for entry in index.named:
                names.setdefault(entry.digest, []).append(entry.name)
            return sorted((self._listed(index, d, sorted(n)) for d, n in names.items()), key=lambda r: r.name)

        return self._names.steadily(read)

    def _listed(self, index: Index, digest: str, names: list[str], earlier: str = "") -> ModelRecord:
        try:
            return self._record(digest, names, earlier)
        except (CorruptData, NotFound) as exc:
            if self._names.read() != index:  # it is being removed: look again
                raise NotFound(exc.message) from exc
            return oci.unreadable(digest, _called(digest, names, earlier), tuple(names), exc.message)

    def get(self, name: str) -> ModelRecord:
        """The model by name, ``name:latest``, ``name@digest`` or digest (``sha256:`` and eight hex digits or more)."""
        return self._names.steadily(lambda index: self._record(*self._find(index, name)))

    def known(self, name: str) -> ModelRecord:
        """Like ``get``, but a model that cannot be read is told as ``models`` tells it."""
        return self._names.steadily(lambda index: self._listed(index, *self._find(index, name)))

    def _find(self, index: Index, name: str) -> tuple[str, list[str], str]:
        """The digest that a word means, its names, and the name whose earlier version it is."""
        found = index.find(name)
        if found is None:
            known = sorted({e.name for e in index.named})
            close = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean '{close[0]}'? " if close else ""
            raise NotFound(
                f"there is no model '{name}' in the store",
                hint=f"{hint}Type `pier pull {name}`.",
                data={"known": known[:50]},
            )
        digest, exact = found
        names = sorted((e.name for e in index.named if e.digest == digest), key=lambda n: (n != exact, n))
        earlier = next((e.previous for e in index.manifests if e.digest == digest and e.previous), "")
        return digest, names, earlier

    def versions(self, name: str) -> list[ModelRecord]:
        """The earlier versions of a name that are still here, the latest first."""
        return [self._record(e.digest, [], name) for e in self._names.read().versions(name)]

    def earlier(self) -> dict[str, int]:
        """How many earlier versions of each name are here, for names that have any."""
        return dict(Counter(e.previous for e in self._names.read().manifests if e.previous))

    def history(self, name: str) -> list[Move]:
        """Where a name pointed and when, the latest first; of a name that was removed, too."""
        current = {e.name: e.digest for e in self._names.read().named}
        for exact in (name, f"{name}:latest", name.removesuffix(":latest")):
            if moves := self._names.history.of(exact, current.get(exact, "")):
                return moves
        return []

    def pulled_from(self, digest: str) -> tuple[str, ...]:
        """The sources that pulls brought a model from, as this machine saw them."""
        return self._names.history.sources(digest)

    @property
    def moves(self) -> int:
        """A number that changes whenever a name moves."""
        return self._names.history.size

    def looks(self) -> dict[str, Move]:
        """When the source of each name was last asked whether the name still means the same."""
        return self._names.history.looks({e.name: e.digest for e in self._names.read().named})

    def note(self, name: str, *, by: str, source: str = "") -> None:
        """Remember that a name was looked at and still means what it meant."""
        with os_errors("cannot write to the store"), locked(self._names.lock):
            record = self.get(name)
            self._names.history.add(record.name, record.digest, was=record.digest, by=by, source=source)

    # --- what is said about models --------------------------------------------------------------------------------

    def attach(self, subject: str, manifest: bytes, blobs: Sequence[bytes] = ()) -> Referrer:
        """Keep a manifest about the model ``subject`` (a digest), with its blobs, for as long as the model is here."""
        document = msgspec.json.decode(manifest, type=oci.Manifest)
        with os_errors("cannot write to the store"), self.lease():
            for data in blobs:
                self.blobs.put(data)
            stored = self.blobs.put(manifest)
            kind = document.artifact_type or document.config.media_type
            self.step("attach:manifest")
            with self._names.edit() as index:
                index.refer(subject, stored, kind)
        return Referrer(stored.digest, stored.size, kind)

    def referrers(self, digest: str) -> list[Referrer]:
        """What is said about a manifest."""
        return [Referrer(e.digest, e.size, e.artifact_type) for e in self._names.read().referrers(digest)]

    # --- names ----------------------------------------------------------------------------------------------------

    def tag(self, old: str, new: str) -> ModelRecord:
        """Give a model one more name; a name that pointed elsewhere moves."""
        check_name(new)
        record = self.get(old)
        with os_errors("cannot name the model"):
            size = self.blobs.path(record.digest).stat().st_size
            self._names.point(new, Blob(record.digest, size), by="tag", source=old, artifact_type=record.config_type)
        return self.get(new)

    def remove(self, name: str) -> Removed:
        """Remove a name with its earlier versions, all names of a digest, or one earlier version (``NAME@digest``).

        The bytes that nothing else needs go too. Conflict while a replica uses what would go.
        """
        record = self.known(name)
        before, before_linked = disk_bytes(self.root, set()), LinkRecord.total(self.root / "links", self.blobs)
        with os_errors("cannot remove the model"):
            with self._names.edit() as index:
                gone = removal.drop(index, name, record.digest, self.pinned())
                for one in gone:
                    self._names.history.add(one, "", was=record.digest, by="rm")
                left = any(e.digest == record.digest for e in index.manifests if not e.subject)
                self.step("remove:history")
            self.step("remove:index")
            self.collect()
        linked = before_linked - LinkRecord.total(self.root / "links", self.blobs)
        freed = max(0, before - disk_bytes(self.root, set()) - linked)
        return Removed(gone or (record.name,), freed, kept=record.size if left else 0, user_linked=linked)

    def materialize(self, record: ModelRecord) -> Path:
        """A read-only folder with the model's files under their own names, sharing the blobs' bytes."""
        return self.lay_out(record.digest, record.files)

    def lay_out(self, digest: str, files: Sequence[ModelFile]) -> Path:
        """The folder of the manifest ``digest`` with these files, which need not be committed yet."""
        target = self.root / "models" / self.blobs.path(digest).name
        with os_errors("cannot lay out the model's files"):
            if not self.blobs.renew(target):
                with self.lease():
                    lay_out(files, self.blob_path, target, self.step)
        return target

    @contextlib.contextmanager
    def hold(self, *names: str) -> Generator[list[ModelRecord]]:
        """Models, and what is said about them, stay while they are read, whoever removes their names meanwhile."""
        with self.lease():
            records = [self.get(name) for name in names]
            with os_errors("cannot read the store"), locked(self._names.lock):
                for record in records:
                    self._names.complete(record.digest)
                for digest in self._names.read().with_referrers({r.digest for r in records}):
                    manifest = self.blobs.path(digest)
                    for blob in (manifest.name, *oci.reachable(manifest)):
                        touch(self.blobs.folder / blob)
            yield records

    def scratch(self, work: str) -> contextlib.AbstractContextManager[Path]:
        """An empty folder on the store's disk for ``work`` (quantize, convert), gone afterwards, even after a kill."""
        return scratch(self.root, work)

    def describe(self, manifest: bytes, config: bytes) -> dict[str, Any]:
        """What ``commit_artifact`` keeps beside an artifact whose blobs are here."""
        digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
        with os_errors("cannot read the model"):
            return describe(manifest, config, self.blob_path, lambda files: self.lay_out(digest, files))

    def recheck(self, record: ModelRecord) -> None:
        """CorruptData when a file that was linked, not copied, changed since; checked before each start."""
        for file in record.files:
            LinkRecord.check(self.root / "links", file.digest)

    def verify(self, name: str) -> list[str]:
        """Hash every file of a model again; the names of those that do not match."""
        record = self.get(name)
        return [f.name for f in record.files if hash_file(self.blob_path(f.digest)) != f.digest]

    def fsck(
        self, report: Callable[[str, int, int], None], *, quick: bool = False, repair: bool = False
    ) -> list[Damage]:
        """What is damaged of all that has a name; ``repair`` puts it away, so that pulls fetch it again."""
        checker = Checker(self.root, self.blobs, self._names)
        found = checker.look(report, quick=quick)
        if repair and found:
            checker.put_away(found)
        return found

    # --- what must stay -------------------------------------------------------------------------------------------

    def lease(self) -> contextlib.AbstractContextManager[None]:
        """While held by a live process, ``collect`` keeps everything that appeared since it was taken."""
        return self._keep.lease()

    def pin(self, digest: str, owner: str) -> None:
        """Keep a model for ``owner`` (a replica) until ``unpin``, across daemons; NotFound when it is gone."""
        self._keep.pin(digest, owner)

    def unpin(self, owner: str) -> None:
        self._keep.unpin(owner)

    def pinned(self) -> dict[str, tuple[str, ...]]:
        """Owners by model digest."""
        return {digest: tuple(sorted(owners)) for digest, owners in self._keep.pins().items()}

    def collect(self) -> int:
        """Remove what nothing needs: unnamed blobs, dead ingests, folders of models that are gone. Bytes freed."""
        return self._cleaner.run(keep=None).freed

    def prune(self, keep: int = 0, *, partials: bool = False, dry_run: bool = False) -> Pruned:
        """``collect``, after forgetting all but the latest ``keep`` earlier versions of each name.

        ``partials`` removes what interrupted pulls left even where a later pull could go on with it.
        """
        return self._cleaner.run(keep=keep, partials=partials, dry_run=dry_run)

    def discard_partials(self) -> int:
        """Remove what interrupted pulls left; bytes freed. Pulls in progress keep theirs."""
        return self._cleaner.discard_partials()

    def usage(self) -> Usage:
        """Where the bytes are."""
        return measure(self.root, self.blobs, self.models(), self._cleaner.run(keep=None, dry_run=True).freed)

    def shares(self) -> list[Share]:
        """What each model and earlier version weighs, and how much of it is its own."""
        return shares(self._names.read(), self.blobs)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _record(self, digest: str, names: list[str], earlier: str = "") -> ModelRecord:
        name = _called(digest, names, earlier)
        with os_errors(f"cannot read the model {name}"):
            beside: dict[str, Any] = {}
            with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
                beside = msgspec.json.decode(self._beside(digest).read_bytes(), type=dict[str, Any])
            return oci.record(digest, name, tuple(names), self.blob_path, beside)


def _called(digest: str, names: Sequence[str], earlier: str) -> str:
    """What a model is called: its first name, the name that it had, or its digest."""
    return names[0] if names else f"{earlier}@{digest}" if earlier else digest
