"""Models of the store as one OCI image layout in a tar, for ``skopeo``, ``podman`` and ``pier import``; reproducible.

The same models give the same bytes: members have no time and no owner, and their order follows the names asked for.
Documents come before weights, so that a reader can refuse early. Everything is hashed on its way out.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from pierhead.errors import CorruptData, UsageError
from pierhead.store.files import new_file, os_errors
from pierhead.store.index import Descriptor, Index
from pierhead.store.layout import Store
from pierhead.store.manifest import Manifest
from pierhead.store.media import MANIFEST, REF_NAME, SOURCE
from pierhead.store.model import ModelRecord

CHUNK = 1 << 20
RECORD = 10_240  # tars end on a multiple of this
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
Write = Callable[[memoryview], int | None]
Report = Callable[[str, int, int], None]


class Bundle(NamedTuple):
    """What an archive will hold: the bytes of its index, and blobs by digest in the order in which they go out."""

    listing: bytes
    blobs: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all blobs."""
        return sum(self.blobs.values())


def bundle(store: Store, records: Iterable[ModelRecord]) -> Bundle:
    """Plan an archive of models and of what is said about them; CorruptData before anything is written.

    The store holds the models for the caller, until they are written.
    """
    entries: list[Descriptor] = []
    documents: dict[str, int] = {}
    layers: dict[str, int] = {}
    for record in records:
        store.recheck(record)
        entries.append(_entry(store, record, _called(record)))
        for digest in (record.digest, *_said(store, record.digest)):
            found = _manifest(store, digest)
            documents[digest] = _size(store, digest)
            documents[found.config.digest] = found.config.size
            kept = layers if digest == record.digest else documents
            kept.update({layer.digest: layer.size for layer in found.layers})
            if digest != record.digest:
                kind = found.artifact_type or found.config.media_type
                entries.append(Descriptor(MANIFEST, digest, documents[digest], kind))
    if len({e.name for e in entries if e.name}) != sum(1 for e in entries if e.name):
        raise UsageError("two of these would have one name in the archive", hint="Give one of them a name: `pier tag`.")
    blobs = documents | {digest: size for digest, size in layers.items() if digest not in documents}
    unique = {(e.digest, e.name): e for e in entries}
    return Bundle(msgspec.json.encode(Index(manifests=list(unique.values()))), blobs)


def write(store: Store, plan: Bundle, out: Write, report: Report) -> None:
    """Write the archive; CorruptData when a blob is not what its digest says. ``report`` hears (digest, done, size)."""
    written = 0

    def emit(data: bytes | memoryview) -> None:
        nonlocal written
        written += len(data)
        rest = memoryview(data)
        while rest:
            rest = rest[out(rest) or 0 :]

    for name, data in (("oci-layout", LAYOUT), ("index.json", plan.listing)):
        emit(_header(name, len(data)))
        emit(data + bytes(-len(data) % 512))
    for folder in ("blobs/", "blobs/sha256/"):
        emit(_header(folder, 0, folder=True))
    for digest, size in plan.blobs.items():
        emit(_header(f"blobs/sha256/{digest.removeprefix('sha256:')}", size))
        for chunk in _checked(store, digest, size, report):
            emit(chunk)
        emit(bytes(-size % 512))
    emit(bytes(1024))
    emit(bytes(-written % RECORD))


def _checked(store: Store, digest: str, size: int, report: Report) -> Iterator[memoryview]:
    running, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK))
    with os_errors("cannot read the model"), store.blob_path(digest).open("rb", buffering=0) as file:
        while done < size and (count := file.readinto(buffer[: min(CHUNK, size - done)])):
            running.update(buffer[:count])
            done += count
            yield buffer[:count]
            report(digest, done, size)
        more = file.read(1)
    if more or done != size or f"sha256:{running.hexdigest()}" != digest:
        raise CorruptData(
            f"the blob {digest[:19]} in the store is damaged",
            hint="`pier fsck` shows which models that concerns; pull them again.",
        )


def _header(name: str, size: int, *, folder: bool = False) -> bytes:
    member = tarfile.TarInfo(name.rstrip("/"))
    member.size = size
    member.mode = 0o755 if folder else 0o644
    member.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
    return member.tobuf(tarfile.GNU_FORMAT if size < 8 << 30 else tarfile.PAX_FORMAT)


def _called(record: ModelRecord) -> str:
    """The name in the archive: an earlier version has the name that it is one of."""
    name = record.name.partition("@sha256:")[0]
    return "" if name.startswith("sha256:") else name


def _entry(store: Store, record: ModelRecord, name: str) -> Descriptor:
    told = {REF_NAME: name} if name else {}
    if record.source and record.annotations.get(SOURCE) != record.source:
        told[SOURCE] = record.source
    return Descriptor(MANIFEST, record.digest, _size(store, record.digest), record.config_type, told)


def _said(store: Store, digest: str) -> list[str]:
    """What refers to a manifest, and what refers to that."""
    found: list[str] = []
    todo = [digest]
    while todo:
        more = [r.digest for r in store.referrers(todo.pop()) if r.digest not in found]
        found += more
        todo += more
    return sorted(found)


def _manifest(store: Store, digest: str) -> Manifest:
    try:
        return msgspec.json.decode(store.blob_path(digest).read_bytes(), type=Manifest)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise CorruptData(f"the manifest {digest[:19]} is damaged: {exc}", hint="Pull the model again.") from exc


def _size(store: Store, digest: str) -> int:
    return store.blob_path(digest).stat().st_size


def save(store: Store, names: Sequence[str], path: Path, report: Report) -> Bundle:
    """Export to a file, which appears under its name when it is whole."""
    with store.hold(*names) as records:
        plan = bundle(store, records)
        with os_errors(f"cannot write {path}"), new_file(path) as file:
            write(store, plan, file.write, report)
    return plan


def send(store: Store, names: Sequence[str], out: IO[bytes], report: Report) -> Bundle:
    """Export to a pipe."""
    with store.hold(*names) as records:
        plan = bundle(store, records)
        write(store, plan, out.write, report)
        out.flush()
    return plan
