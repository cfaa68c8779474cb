"""Models out of an OCI image layout in a tar, read once and in order, from whoever wrote it; all calls block.

Blobs may come before the index that names them, so each is hashed on its way into the store and counts for nothing
until the index has been understood. Then all models of the archive get their names, or none does.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import msgspec

from pierhead.errors import CorruptData, PierError, UsageError
from pierhead.sources.check import check
from pierhead.store.blobs import digest_of
from pierhead.store.index import Descriptor, Index, decode_index
from pierhead.store.layout import Store
from pierhead.store.manifest import Manifest
from pierhead.store.media import SOURCE
from pierhead.store.model import ModelRecord
from pierhead.store.names import check_name
from pierhead.store.sound import sound_files, sound_manifest
from pierhead.store.tar import Archive, Member, opened_stream

MAX_DOCUMENT = 4 << 20
MAX_ENTRIES = 4096
CONTAINERD_NAME = "io.containerd.image.name"
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")
Report = Callable[[str, int, int], None]


class _Model(NamedTuple):
    """One model of the archive, looked through."""

    name: str
    digest: str
    manifest: bytes
    config: bytes
    source: str


def import_models(
    store: Store, stream: IO[bytes], *, name: str = "", allow_unsafe: bool = False, report: Report
) -> list[ModelRecord]:
    """Bring the models of an archive into the store under their own names, or the only one under ``name``.

    CorruptData for an archive that is damaged or not honest, UsageError for one that holds something else; nothing of
    it stays then. ``report`` hears (digest, done, size).
    """
    if name:
        check_name(name)
    intake = _Intake(store, report)
    try:
        with store.lease():
            intake.read(stream)
            index = intake.index()
            models = _models(store, index, name)
            beside = [_looked_into(store, model, allow_unsafe) for model in models]
            statements = _statements(store, index, {m.digest for m in models})
            records = [
                store.commit_artifact(m.name, m.manifest, m.config, b, by="import")
                for m, b in zip(models, beside, strict=True)
            ]
            for subject, body in statements:
                store.attach(subject, body)
    finally:
        store.collect()  # what the archive held beyond its models, or all of it
    return records


# --- reading ----------------------------------------------------------------------------------------------------------


class _Intake:
    """Reads the archive's members; blobs go into the store, the two documents are kept."""

    def __init__(self, store: Store, report: Report) -> None:
        self._store = store
        self._report = report
        self._documents: dict[str, bytes] = {}
        self._blobs: set[str] = set()

    def read(self, stream: IO[bytes]) -> None:
        try:
            archive = Archive(opened_stream(stream))
            for member in archive:
                if not member.is_folder:
                    self._take(archive, member)
        except CorruptData as exc:
            said = exc.message.removeprefix("an archive in the model cannot be unpacked: ")
            hint = "Ask for it again; `sha256sum` on both sides shows whether it came over whole."
            raise CorruptData(f"the archive cannot be imported: {said}", hint=hint) from exc

    def _take(self, archive: Archive, member: Member) -> None:
        blob = _BLOB.fullmatch(member.path)
        if blob:
            self._ingest(archive, member, f"sha256:{blob[1]}")
        elif member.path in ("index.json", "oci-layout"):
            if member.path in self._documents:
                raise CorruptData(f"it holds {member.path} twice")
            if member.size > MAX_DOCUMENT:
                raise CorruptData(f"its {member.path} claims {member.size} bytes")
            self._documents[member.path] = b"".join(archive.data())
        elif member.path.startswith("blobs/"):
            raise CorruptData(f"it holds a blob that is not named by a sha256 digest: {member.path[:100]!r}")

    def _ingest(self, archive: Archive, member: Member, digest: str) -> None:
        if digest in self._blobs:
            raise CorruptData(f"it holds the blob {digest[:19]} twice")
        self._blobs.add(digest)
        with self._store.ingest(digest, size=member.size, digest=digest) as ingest:
            if ingest.done is not None:
                self._compare(archive, digest)
                return
            try:
                skip, done = ingest.offset, 0
                for chunk in archive.data():
                    ingest.write(chunk[skip:])
                    skip = max(0, skip - len(chunk))
                    done += len(chunk)
                    self._report(digest, done, member.size)
                ingest.commit()
            except BaseException:
                ingest.abort()
                raise

    def _compare(self, archive: Archive, digest: str) -> None:
        """A blob that the store has: its bytes must be what their name says all the same."""
        running = hashlib.sha256()
        for chunk in archive.data():
            running.update(chunk)
        if f"sha256:{running.hexdigest()}" != digest:
            raise CorruptData(f"the blob {digest[:19]} has other bytes than its name says")

    def index(self) -> Index:
        """What the archive says it holds."""
        if "index.json" not in self._documents or "oci-layout" not in self._documents:
            raise UsageError(
                "this is no OCI archive: it has no index.json and oci-layout",
                hint="`pier export` writes one, and so does `skopeo copy … oci-archive:FILE`.",
            )
        try:
            index = decode_index(self._documents["index.json"])
        except (msgspec.DecodeError, RecursionError) as exc:
            raise CorruptData(f"the archive's index.json cannot be read: {exc}", hint="Ask for it again.") from exc
        if len(index.manifests) > MAX_ENTRIES:
            raise CorruptData(f"the archive's index.json has more than {MAX_ENTRIES} entries")
        return index


# --- understanding ----------------------------------------------------------------------------------------------------


def _models(store: Store, index: Index, name: str) -> list[_Model]:
    named = [(_name(e), e) for e in index.manifests]
    chosen = [(n, e) for n, e in named if n]
    if not chosen or name:
        alone = chosen or [(n, e) for n, e in named if _subject(store, e) is None]
        if len(alone) != 1 or not name:
            count = f"{len(alone)} models" if len(alone) != 1 else "a model without a name"
            hint = "Type `pier import FILE --name NAME`." if len(alone) == 1 else "Leave out --name, or export one."
            raise UsageError(f"the archive holds {count}", hint=hint)
        chosen = [(name, alone[0][1])]
    if len({n for n, _ in chosen}) != len(chosen):
        raise CorruptData("the archive gives two models one name", hint="Ask who wrote it.")
    for one, _ in chosen:
        check_name(one)
    return [_model(store, one, entry) for one, entry in chosen]


def _name(entry: Descriptor) -> str:
    return entry.name or entry.annotations.get(CONTAINERD_NAME, "")


def _model(store: Store, name: str, entry: Descriptor) -> _Model:
    where = f"'{name}' in the archive"
    body = _document(store, entry.digest, where)
    digest = entry.digest
    if entry.media_type.endswith(("index.v1+json", "list.v2+json")):
        inner = _nested(body, where)
        digest, body = inner.digest, _document(store, inner.digest, where)
    found = sound_manifest(body, where)
    _present(store, found, where)
    config = _document(store, found.config.digest, where)
    sound_files(found, config, where)
    source = (entry.annotations.get(SOURCE) or found.annotations.get(SOURCE, ""))[:1024]
    with contextlib.suppress(PierError):
        source = source or store.get(digest).source  # it is here already
    return _Model(name, digest, body, config, source)


def _nested(body: bytes, where: str) -> Descriptor:
    try:
        entries = msgspec.json.decode(body, type=Index).manifests
    except (msgspec.DecodeError, RecursionError) as exc:
        raise CorruptData(f"{where} has no manifest that can be read: {exc}") from exc
    if not entries:
        raise CorruptData(f"{where} is a list without a model")
    return entries[0]


def _document(store: Store, digest: str, where: str) -> bytes:
    """A small blob's bytes; it stays while the lease lasts."""
    _has(store, digest, where)
    path = store.blob_path(digest)
    if path.stat().st_size > MAX_DOCUMENT:
        raise CorruptData(f"{where} has a document of {path.stat().st_size} bytes")
    data = path.read_bytes()
    if digest_of(data) != digest:
        raise CorruptData(f"the store's blob {digest[:19]} is damaged", hint="`pier fsck` shows what that concerns.")
    return data


def _present(store: Store, found: Manifest, where: str) -> None:
    for part in (found.config, *found.layers):
        _has(store, part.digest, where)
        size = store.blob_path(part.digest).stat().st_size
        if size != part.size:
            raise CorruptData(f"{where} says that {part.digest[:19]} has {part.size} bytes, it has {size}")


def _has(store: Store, digest: str, where: str) -> None:
    try:
        there = store.blobs.claim(digest)
    except UsageError:
        there = False
    if not there:
        raise CorruptData(f"{where} lacks the blob {digest[:19]}", hint="The archive is not whole. Ask for it again.")


def _looked_into(store: Store, model: _Model, allow_unsafe: bool) -> dict[str, Any]:
    """What is kept beside a model; UnsafeContent where it would run code."""
    found = store.describe(model.manifest, model.config)
    files = sound_files(sound_manifest(model.manifest, model.name), model.config, model.name)
    layers = [(f.name, store.blob_path(f.digest)) for f in files]
    again = "pier import FILE --allow-unsafe"
    check(layers, allow=allow_unsafe, again=again)
    return {**found, "source": model.source}


# --- what is said about the models ------------------------------------------------------------------------------------


def _subject(store: Store, entry: Descriptor) -> str | None:
    """The digest that a manifest of the archive is about; None where it is about nothing, or cannot be read."""
    try:
        body = _document(store, entry.digest, "an entry of the archive")
        subject = msgspec.json.decode(body, type=Manifest).subject
    except (PierError, msgspec.DecodeError, RecursionError):
        return None
    return subject.digest if subject else None


def _statements(store: Store, index: Index, models: set[str]) -> list[tuple[str, bytes]]:
    """What is said about these models, as (subject, manifest); what it leans on must be whole."""
    about = {e.digest: _subject(store, e) for e in index.manifests if not _name(e)}
    found: list[tuple[str, bytes]] = []
    known = set(models)
    more = True
    while more:
        more = False
        for digest, subject in about.items():
            if subject in known and digest not in known:
                body = _document(store, digest, "a statement in the archive")
                _present(store, msgspec.json.decode(body, type=Manifest), "a statement in the archive")
                found.append((subject, body))
                known.add(digest)
                more = True
    return found
