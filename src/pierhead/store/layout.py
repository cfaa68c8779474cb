"""The store: models as OCI artifacts in an image layout that other tools read; all calls block and are crash-safe.

Content becomes visible in one step: blobs by a rename, names by replacing ``index.json`` under a lock. What neither a
name nor one of its earlier versions reaches is garbage, and ``collect`` reclaims it unless a pin or a live lease may
still need it.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pierhead.errors import Conflict, CorruptData, NotFound, UsageError
from pierhead.store import garbage
from pierhead.store import manifest as oci
from pierhead.store.blobs import Blobs, Ingest
from pierhead.store.files import (
    disk_bytes,
    locked,
    mapped,
    os_errors,
    remove_tree,
    replace,
)
from pierhead.store.files import reflink as clone
from pierhead.store.history import History, Move, now
from pierhead.store.index import Index, decode_index, is_digest_like
from pierhead.store.link import LinkRecord, adopt, hash_file
from pierhead.store.media import CONFIG, CREATED, SOURCE
from pierhead.store.model import Blob, Layer, ModelRecord, Referrer, Removed, Usage

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@:/+-]{0,253}[A-Za-z0-9_])?")


def _nothing(step: str) -> None:
    """Where tests stop a process; production does nothing."""


class Store:
    """The content-addressed OCI image layout below ``root``. Safe to use from many threads and processes."""

    def __init__(self, root: Path, step: Callable[[str], None] = _nothing) -> None:
        self.root = root
        self.step = step
        self.blobs = Blobs(root, step)
        self._history = History(root / "history.jsonl")

    @classmethod
    def open(cls, root: Path, step: Callable[[str], None] = _nothing) -> Store:
        """The store at ``root``, made if it is not there; a store that can only be read opens too."""
        store = cls(root, step)
        if (root / "index.json").exists() and store.blobs.folder.is_dir():
            return store
        with os_errors(f"cannot create the store in {root}"):
            for folder in (store.blobs.folder, store.blobs.ingests, *(root / n for n in ("models", "pins", "leases"))):
                folder.mkdir(parents=True, exist_ok=True, mode=0o755)
            replace(root / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
            with locked(root / "index.lock"):
                if not (root / "index.json").exists():
                    replace(root / "index.json", msgspec.json.encode(Index()))
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

    def adopt_file(self, path: Path, *, link: bool = False) -> Blob:
        """Take a user's file in: by reflink, else a copy; with ``link`` a hard link that ``recheck`` watches."""
        with os_errors(f"cannot take {path} into the store"), locked(self.blobs.ingests / "adopt.lock"):
            return adopt(self.blobs, self.root / "links", path, link=link)

    def has(self, digest: str) -> bool:
        return self.blobs.has(digest)

    def blob_path(self, digest: str) -> Path:
        """Where the blob is; NotFound when it is not there."""
        path = self.blobs.path(digest)
        if not path.is_file():
            raise NotFound(f"the store has no blob {digest}", hint="Pull the model again.")
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
        self._check_name(name)
        for layer in layers:
            oci.check_filepath(layer.filepath)
            self.blob_path(layer.digest)
        config = self.blobs.put(oci.config_bytes(layers, metadata))
        self.step("model:config")
        told = {CREATED: now(), **(annotations or {})}
        with os_errors("cannot commit the model"):
            stored = self.blobs.put(oci.manifest_bytes(layers, config, told))
            self.step("model:manifest")
            self._point(name, stored, by=by, source=told.get(SOURCE, ""))
        return self.get(name)

    def commit_artifact(
        self, name: str, manifest: bytes, config: bytes, beside: dict[str, Any], *, by: str = "pull"
    ) -> ModelRecord:
        """Give a model that others packaged a name; its documents stay as they are, to the byte.

        ``beside`` (``summary``, ``source``) is kept next to it. NotFound when a layer's blob is missing.
        """
        self._check_name(name)
        document = msgspec.json.decode(manifest, type=oci.Manifest)
        with os_errors("cannot commit the model"):
            if self.blobs.put(config).digest != document.config.digest:
                raise CorruptData(f"the config of '{name}' is not the one that its manifest names")
            for layer in document.layers:
                self.blob_path(layer.digest)
            self.step("model:config")
            stored = self.blobs.put(manifest)
            self.step("model:manifest")
            (self.root / "beside").mkdir(exist_ok=True)
            replace(self._beside(stored.digest), msgspec.json.encode(beside))
            kind = document.artifact_type or document.config.media_type
            self._point(name, stored, by=by, source=str(beside.get("source") or ""), artifact_type=kind)
        return self.get(name)

    def _point(self, name: str, stored: Blob, *, by: str, source: str = "", artifact_type: str = CONFIG) -> None:
        """Make a name mean a manifest; what it meant before becomes an earlier version of it."""
        with self._index() as index:
            was = next((e.digest for e in index.named if e.name == name), "")
            self._history.add(name, stored.digest, was=was, by=by, source=source)
            self.step("model:history")
            index.set(name, stored, artifact_type)
            self.step("model:index")

    def _beside(self, digest: str) -> Path:
        return self.root / "beside" / self.blobs.path(digest).name

    def models(self) -> list[ModelRecord]:
        """All models, each once, by first name."""
        index = self._read_index()
        names: dict[str, list[str]] = {}
        for entry in index.named:
            names.setdefault(entry.digest, []).append(entry.name)
        return sorted((self._record(d, sorted(n)) for d, n in names.items()), key=lambda r: r.name)

    def get(self, name: str) -> ModelRecord:
        """The model by name, ``name:latest``, ``name@digest`` or digest (``sha256:`` and eight hex digits or more)."""
        index = self._read_index()
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
        return self._record(digest, names, earlier)

    def versions(self, name: str) -> list[ModelRecord]:
        """The earlier versions of a name that are still here, the latest first."""
        return [self._record(e.digest, [], name) for e in self._read_index().versions(name)]

    def history(self, name: str) -> list[Move]:
        """Where a name pointed and when, the latest first."""
        found = next((e for e in self._read_index().named if e.name == name), None)
        return self._history.of(name, found.digest if found else "")

    def note(self, name: str, *, by: str, source: str = "") -> None:
        """Remember that a name was looked at and still means what it meant."""
        with os_errors("cannot write to the store"), locked(self.root / "index.lock"):
            digest = self.get(name).digest
            self._history.add(name, digest, was=digest, by=by, source=source)

    # --- what is said about models --------------------------------------------------------------------------------

    def attach(self, subject: str, manifest: bytes, blobs: Sequence[bytes] = ()) -> Referrer:
        """Keep a manifest about the model ``subject`` (a digest), with its blobs, for as long as the model is here."""
        document = msgspec.json.decode(manifest, type=oci.Manifest)
        with os_errors("cannot write to the store"):
            for data in blobs:
                self.blobs.put(data)
            stored = self.blobs.put(manifest)
            kind = document.artifact_type or document.config.media_type
            self.step("attach:manifest")
            with self._index() as index:
                index.refer(subject, stored, kind)
        return Referrer(stored.digest, stored.size, kind)

    def referrers(self, digest: str) -> list[Referrer]:
        """What is said about a manifest."""
        return [Referrer(e.digest, e.size, e.artifact_type) for e in self._read_index().referrers(digest)]

    # --- names ----------------------------------------------------------------------------------------------------

    def tag(self, old: str, new: str) -> ModelRecord:
        """Give a model one more name; a name that pointed elsewhere moves."""
        self._check_name(new)
        record = self.get(old)
        with os_errors("cannot name the model"):
            size = self.blobs.path(record.digest).stat().st_size
            self._point(new, Blob(record.digest, size), by="tag", source=old, artifact_type=record.config_type)
        return self.get(new)

    def remove(self, name: str) -> Removed:
        """Remove a name and, when it was the last one, the bytes that nothing else needs. Conflict while pinned."""
        record = self.get(name)
        gone = list(record.names) if is_digest_like(name) or not record.names else [record.name]
        before = self._used()
        before_linked = LinkRecord.total(self.root / "links", self.blobs)
        with os_errors("cannot remove the model"):
            with self._index() as index:
                left = [e for e in index.named if e.digest == record.digest and e.name not in gone]
                owners = self._pins().get(record.digest)
                if owners and not left:
                    raise Conflict(
                        f"'{name}' is in use by {', '.join(sorted(owners))}",
                        hint=f"Type `pier stop {record.name}` first.",
                    )
                for one in gone:
                    self._history.add(one, "", was=record.digest, by="rm")
                index.drop(gone)
                if not record.names:  # an earlier version
                    index.manifests = [e for e in index.manifests if e.name or e.digest != record.digest]
                self.step("remove:index")
            self.collect()
        linked = before_linked - LinkRecord.total(self.root / "links", self.blobs)
        freed = max(0, before - self._used() - linked)
        return Removed(tuple(gone), freed, kept=record.size if left else 0, user_linked=linked)

    def materialize(self, record: ModelRecord) -> Path:
        """A read-only folder with the model's files under their own names, sharing the blobs' bytes."""
        target = self.root / "models" / record.digest.removeprefix("sha256:")
        if target.is_dir():
            return target
        temporary = target.with_name(f".{uuid.uuid4().hex}")
        with os_errors("cannot lay out the model's files"):
            try:
                for file in record.files:
                    oci.check_filepath(file.name)
                    place = temporary / file.name
                    place.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
                    _share(self.blob_path(file.digest), place)
                self.step("materialize:filled")
                os.rename(temporary, target)
            except OSError:
                if not target.is_dir():  # somebody else was first
                    raise
            finally:
                remove_tree(temporary)
        return target

    def recheck(self, record: ModelRecord) -> None:
        """CorruptData when a file that was linked, not copied, changed since; checked before each start."""
        for file in record.files:
            LinkRecord.check(self.root / "links", file.digest)

    def verify(self, name: str) -> list[str]:
        """Hash every file of a model again; the names of those that do not match."""
        record = self.get(name)
        return [f.name for f in record.files if hash_file(self.blob_path(f.digest)) != f.digest]

    # --- what must stay -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(self) -> Generator[None]:
        """While held by a live process, ``collect`` keeps everything that appeared since it was taken."""
        path = self.root / "leases" / f"{uuid.uuid4().hex}.lock"
        with os_errors("cannot write to the store"):
            path.parent.mkdir(exist_ok=True)
            holder = locked(path)
            holder.__enter__()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            holder.__exit__(None, None, None)

    def pin(self, digest: str, owner: str) -> None:
        """Keep a model for ``owner`` (a replica) until ``unpin``, across daemons."""
        replace(self.root / "pins" / _owner(owner), self.blobs.path(digest).name.encode())

    def unpin(self, owner: str) -> None:
        (self.root / "pins" / _owner(owner)).unlink(missing_ok=True)

    def pinned(self) -> dict[str, tuple[str, ...]]:
        """Owners by model digest."""
        return {digest: tuple(sorted(owners)) for digest, owners in self._pins().items()}

    def collect(self) -> int:
        """Remove what nothing needs: unnamed blobs, dead ingests, folders of models that are gone. Bytes freed."""
        before = self._used()
        with os_errors("cannot clean up the store"), self._index() as index:
            live = index.live(self._pins())
            index.manifests = [e for e in index.manifests if e.digest in live]
            for path in garbage.find(self.root, live, garbage.horizon(self.root)):
                remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)
                self.step("collect:removed")
        return max(0, before - self._used())

    def prune(self, keep: int = 0) -> int:
        """``collect``, after forgetting all but the latest ``keep`` earlier versions of each name. Bytes freed."""
        before = self._used()
        with os_errors("cannot clean up the store"), self._index() as index:
            index.trim({e.previous for e in index.manifests if e.previous}, keep)
        self.step("prune:index")
        self.collect()
        return max(0, before - self._used())

    def usage(self) -> Usage:
        """Where the bytes are."""
        seen: set[tuple[int, int]] = set()
        blobs = disk_bytes(self.blobs.folder, seen)
        ingests = disk_bytes(self.blobs.ingests, seen)
        materialized = disk_bytes(self.root / "models", seen)
        rest = disk_bytes(self.root, seen)
        disk = shutil.disk_usage(self.root)
        return Usage(
            total=blobs + ingests + materialized + rest,
            blobs=blobs,
            ingests=ingests,
            materialized=materialized,
            reclaimable=sum(garbage.size(p) for p in self._garbage()),
            linked_outside=LinkRecord.total(self.root / "links", self.blobs),
            free=disk.free,
            models={r.name: r.size for r in self.models()},
        )

    # --- inside ---------------------------------------------------------------------------------------------------

    def _used(self) -> int:
        return disk_bytes(self.root, set())

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name) or ".." in name or "//" in name or name.startswith("sha256:"):
            raise UsageError(
                f"'{name[:100]}' cannot name a model", hint="Use letters, digits and . _ - : / @, up to 255 of them."
            )

    def _read_index(self) -> Index:
        path = self.root / "index.json"
        try:
            return decode_index(path.read_bytes())
        except msgspec.DecodeError as exc:
            raise CorruptData(
                f"the store's {path} cannot be read: {exc}",
                hint=f"Restore it from a backup, or move {self.root} away and pull again.",
            ) from exc
        except OSError as exc:
            raise mapped(exc, f"cannot read the store in {self.root}") from exc

    @contextlib.contextmanager
    def _index(self) -> Generator[Index]:
        with locked(self.root / "index.lock"):
            index = self._read_index()
            yield index
            replace(self.root / "index.json", msgspec.json.encode(index))

    def _record(self, digest: str, names: list[str], earlier: str = "") -> ModelRecord:
        name = names[0] if names else f"{earlier}@{digest}" if earlier else digest
        with os_errors(f"cannot read the model {name}"):
            beside: dict[str, Any] = {}
            with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
                beside = msgspec.json.decode(self._beside(digest).read_bytes(), type=dict[str, Any])
            return oci.record(digest, name, tuple(names), self.blob_path, beside)

    def _pins(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        with contextlib.suppress(FileNotFoundError):
            for path in (self.root / "pins").iterdir():
                if not path.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        found.setdefault(f"sha256:{path.read_text().strip()}", set()).add(path.name)
        return found

    def _garbage(self) -> list[Path]:
        return garbage.find(self.root, self._read_index().live(self._pins()), garbage.horizon(self.root))

    def discard_partials(self) -> int:
        """Remove what interrupted pulls left; bytes freed. Pulls in progress keep theirs."""
        before = self._used()
        with os_errors("cannot clean up the store"):
            garbage.discard_partials(self.blobs.ingests)
        return max(0, before - self._used())


def _owner(owner: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", owner):
        raise UsageError(f"not an owner's name: {owner[:80]!r}")
    return owner


def _share(blob: Path, place: Path) -> None:
    try:
        os.link(blob, place)
    except OSError:
        if not clone(blob, place):
            shutil.copyfile(blob, place)
        place.chmod(0o444)
