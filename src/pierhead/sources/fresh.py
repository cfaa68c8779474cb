"""Whether a model in the store is still what its source gives out: asks for a digest or a commit, fetches nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import Iterable
from typing import Literal, Protocol, runtime_checkable

from pierhead.errors import AccessDenied, NotFound, OutOfSpace, PierError
from pierhead.events import Listener, PullDone
from pierhead.refs import Reference, parse
from pierhead.sources.base import Source
from pierhead.sources.catalog import Catalog, Entry
from pierhead.store.history import Move
from pierhead.store.layout import Store
from pierhead.store.media import REVISION
from pierhead.store.model import ModelRecord

AT_ONCE = 8
PATIENCE = 10.0  # seconds for one answer
_PINNED = re.compile(r"(.+)@(sha256:[0-9a-f]{64}|[0-9a-f]{40})")
_COMMIT = re.compile(r"[0-9a-f]{40}")

State = Literal["current", "stale", "gone", "fixed", "unknown"]


@runtime_checkable
class Asked(Protocol):
    """A source that can say cheaply what a reference stands for now."""

    async def current(self, reference: Reference) -> str:
        """A digest or a commit; empty where the source does not tell."""
        ...


class Sources(Protocol):
    """Finds the source of a reference."""

    def of(self, reference: Reference) -> Source: ...


@dataclasses.dataclass(frozen=True)
class Freshness:
    """``fixed``: nothing can change (a digest, a file); ``unknown``: the source did not answer, ``reason`` says why."""

    state: State
    pin: str = ""  # what the source gives out now
    reason: str = ""


def origin(record: ModelRecord) -> tuple[Reference | None, str]:
    """What to ask for a newer version of a model, and the digest or commit that this one has; None where nobody can."""
    found = _PINNED.fullmatch(record.source)
    if found is None:
        return None, ""
    try:
        reference = parse(found[1])
    except PierError:
        return None, ""
    if reference.kind == "oci":
        return (reference if reference.tag else None), found[2]
    if reference.kind in ("hf", "ms"):
        asked = record.annotations.get(REVISION, "")
        if _COMMIT.fullmatch(asked):
            return None, found[2]
        return dataclasses.replace(reference, revision=asked), found[2]
    return None, found[2]


def meaning(catalog: Catalog, store: Store, name: Reference) -> Entry | Reference:
    """What a short name is pulled from: the catalog's sources, else where the model of that name came from."""
    record = complete(store, str(name))
    again = origin(record)[0] if record else None
    try:
        found = catalog.meaning(name)
    except NotFound:
        if again is None:
            raise
        return again
    return again or found if isinstance(found, Reference) else found


def planned_again(store: Store, name: str, source: str) -> ModelRecord | None:
    """The model of that name, where this machine itself pulled it from ``source``, which says exactly what it was.

    What a manifest or an archive says of where it is from does not count.
    """
    record = complete(store, name) if _PINNED.fullmatch(source) else None
    return record if record is not None and source in store.pulled_from(record.digest) else None


async def still(store: Store, name: str, record: ModelRecord, source: str, listener: Listener) -> None:
    """Nothing has changed at the source: that it was looked at is remembered."""
    with contextlib.suppress(AccessDenied, OutOfSpace, NotFound):  # the model is here all the same
        await asyncio.to_thread(store.note, name, by="pull", source=source)
    listener(PullDone(name=name, digest=record.digest, size=record.size, cached=True))


async def unchanged(store: Store, source: Source, reference: Reference, name: str) -> ModelRecord | None:
    """The model of that name, where one question tells that a pull of the reference would bring the same."""
    if reference.kind != "oci" or not isinstance(source, Asked):
        return None  # other sources tell it with their plan
    record = await asyncio.to_thread(complete, store, name)
    if record is None:
        return None
    known, _ = origin(record)
    if known is None or (known.repo, known.tag) != (reference.repo, reference.tag or "latest"):
        return None
    return record if await source.current(reference) == record.digest else None  # not: the digest that it claims


def complete(store: Store, name: str) -> ModelRecord | None:
    """The model of exactly that name, with all its blobs; None where there is none."""
    try:
        record = store.get(name)
    except PierError:
        return None
    whole = record.name == name and all(store.has(f.digest) for f in record.files)
    return record if whole else None


def stale_since(record: ModelRecord, last: Move | None) -> str:
    """What the source had when it was last asked, where that was another version; empty where it was not."""
    if last is None or last.by != "check":
        return ""
    pin = last.source.rpartition("@")[2]
    return pin if pin and pin not in (origin(record)[1], record.digest) else ""


async def check(store: Store, records: Iterable[ModelRecord], sources: Sources) -> dict[str, Freshness]:
    """Ask the sources of models, a few at a time, and note the answers in the history; by digest of the model.

    Never raises for a source that does not answer.
    """
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(record: ModelRecord) -> tuple[str, Freshness]:
        async with slots:
            found = await _ask(record, sources)
        if found.pin:
            source = f"{record.source.rpartition('@')[0]}@{found.pin}"
            await asyncio.to_thread(_note, store, record, source)
        return record.digest, found

    return dict(await asyncio.gather(*(one(record) for record in records)))


async def _ask(record: ModelRecord, sources: Sources) -> Freshness:
    reference, pin = origin(record)
    if reference is None:
        return Freshness("fixed")
    try:
        source = sources.of(reference)
        if not isinstance(source, Asked):
            return Freshness("unknown", reason="its source cannot be asked")
        async with asyncio.timeout(PATIENCE):
            now = await source.current(reference)
    except TimeoutError:
        return Freshness("unknown", reason="its source does not answer")
    except NotFound as exc:
        return Freshness("gone", reason=exc.message)
    except (AccessDenied, PierError) as exc:
        return Freshness("unknown", reason=exc.message)
    if not now:
        return Freshness("unknown", reason="its source does not tell")
    mine = record.digest if reference.kind == "oci" else pin
    return Freshness("current" if now == mine else "stale", now)


def _note(store: Store, record: ModelRecord, source: str) -> None:
    for name in record.names:
        try:
            store.note(name, by="check", source=source)
        except PierError:
            return  # a store that can only be read: the answer holds all the same
