"""Models of Ollama or Docker Model Runner on this machine, listed and taken over; their folders stay as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from pierhead.errors import Conflict, NotFound, PierError, UsageError
from pierhead.events import AnyEvent, Listener, Note, PullProgress, ignore
from pierhead.refs import Reference, parse
from pierhead.sources.base import Source
from pierhead.sources.docker_store import DockerStore, docker_folders, our_name
from pierhead.sources.ollama import Ollama
from pierhead.sources.ollama_store import OllamaStore, ollama_folders
from pierhead.sources.pull import pull_from
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord
from pierhead.trust.gate import Gate

Tool = Literal["ollama", "docker"]
TOOLS: dict[Tool, str] = {"ollama": "Ollama", "docker": "Docker Model Runner"}
AT_ONCE = 2


@dataclass(frozen=True)
class Offer:
    """One model of another tool's: ``names`` are what it would be called here, ``state`` what stands in the way.

    ``new``: it can be taken; ``here``: the store has its weights under that name; ``name in use``: the store has
    another model of that name; ``not whole`` and ``unusable``: ``reason`` says why.
    """

    names: tuple[str, ...]
    size: int
    state: str
    folder: str
    weights: str = ""
    reason: str = ""
    error: PierError | None = None
    source: Source | None = None
    reference: Reference | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        plain = {"name": self.name, "names": list(self.names), "size": self.size, "state": self.state}
        return {**plain, "folder": self.folder, "weights": self.weights, "reason": self.reason}


@dataclass(frozen=True)
class Taken:
    """What became of one offer: the model, or why not."""

    offer: Offer
    record: ModelRecord | None = None
    error: PierError | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        found: dict[str, Any] = {"name": self.offer.name, "names": list(self.offer.names), "size": self.offer.size}
        if self.record is not None:
            return {**found, "state": "taken", "digest": self.record.digest}
        return {**found, "state": "failed", "error": self.error.to_dict() if self.error else {}}


def folders(tool: Tool, path: Path | None, env: Mapping[str, str]) -> tuple[Path, ...]:
    """The tool's folders; NotFound when there are none."""
    look = ollama_folders if tool == "ollama" else docker_folders
    if path is not None:
        given = {"HOME": env.get("HOME", ""), "OLLAMA_MODELS" if tool == "ollama" else "MODELS_PATH": str(path)}
        found = look(given)
        if not found:
            marks = "'manifests' and 'blobs'" if tool == "ollama" else "'layout.json' and 'models.json'"
            raise NotFound(f"{path} is not a folder of {TOOLS[tool]}'s models", hint=f"Such a folder holds {marks}.")
        return found
    found = look(env)
    if not found:
        raise NotFound(
            f"{TOOLS[tool]} keeps no models on this machine that you may read",
            hint=f"If they are in another place: `pier adopt {tool} --path FOLDER`. A folder of root's needs sudo.",
        )
    return found


async def offers(tool: Tool, places: Sequence[Path], store: Store) -> list[Offer]:
    """What the tool has, by name; of a name in two folders the first."""
    found: dict[str, Offer] = {}
    for place in places:
        listed = await (_of_ollama(place) if tool == "ollama" else _of_docker(place))
        for offer in listed:
            found.setdefault(offer.name, offer)
    states = [await asyncio.to_thread(_compared, offer, store) for offer in found.values()]
    return sorted(states, key=lambda offer: offer.name)


async def _of_ollama(root: Path) -> list[Offer]:
    folder = OllamaStore(root)
    source = Ollama(None, {}, ignore, folder)
    names = await asyncio.to_thread(folder.names)
    return [await _offer(source, parse(f"ollama://{n.short}"), (n.ours,), root) for n in names]


async def _of_docker(root: Path) -> list[Offer]:
    folder = DockerStore(root)
    entries = await asyncio.to_thread(folder.entries)
    return [await _offer(folder, Reference("oci", repo="docker", digest=e.id), e.ours, root) for e in entries]


async def _offer(source: Source, reference: Reference, names: tuple[str, ...], root: Path) -> Offer:
    """Plan it to see whether it can be taken; nothing of its weights but the header is read."""
    offer = Offer(names, 0, "new", str(root), source=source, reference=reference)
    try:
        plan = await source.plan(reference)
    except PierError as exc:
        state = "not whole" if exc.data.get("missing") else "unusable"
        return replace(offer, state=state, reason=exc.message, error=exc)
    weights = next((f.digest for f in plan.files if f.role == "weights"), "")
    return replace(offer, size=plan.total, weights=weights)


def _compared(offer: Offer, store: Store) -> Offer:
    """With a look at what the store has under that name."""
    if offer.state != "new":
        return offer
    try:
        record = store.get(offer.name)
    except PierError:
        return offer
    if any(f.role == "weights" and f.digest == offer.weights for f in record.files):
        return replace(offer, state="here")
    taken = Conflict(
        f"the store has another model called '{offer.name}'",
        hint=f"--force moves the name to this one; `pier tag {offer.name} NEW` keeps a name for the other first.",
    )
    return replace(offer, state="name in use", reason=taken.message, error=taken)


def chosen(tool: Tool, available: Sequence[Offer], wanted: Sequence[str]) -> list[Offer]:
    """The offers that a user's words mean; NotFound names what there is."""
    return [_one(tool, available, word) for word in wanted]


def _one(tool: Tool, available: Sequence[Offer], word: str) -> Offer:
    name = our_name(word.removeprefix("ollama://").removeprefix("ollama:").removeprefix("oci://"))
    candidates = {name, name.removeprefix("library/")} if tool == "ollama" else {name, f"ai/{name}"}
    for offer in available:
        if candidates & set(offer.names):
            return offer
    raise NotFound(
        f"{TOOLS[tool]} has no model '{word}'",
        hint=f"It has: {', '.join(o.name for o in available[:20]) or 'none'}.",
        data={"known": [o.name for o in available[:50]]},
    )


async def take(
    wanted: Sequence[Offer],
    *,
    store: Store,
    gate: Gate,
    listener: Listener = ignore,
    link: bool = False,
    force: bool = False,
    allow_unsafe: bool = False,
) -> list[Taken]:
    """Bring the models into the store, a few at once; one that fails does not stop the others."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(offer: Offer) -> Taken:
        async with slots:
            try:
                record = await _take(offer, store, gate, listener, link=link, force=force, allow_unsafe=allow_unsafe)
            except PierError as exc:
                return Taken(offer, error=exc)
            return Taken(offer, record)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(offer)) for offer in wanted]
    return [task.result() for task in tasks]


async def _take(
    offer: Offer, store: Store, gate: Gate, listener: Listener, *, link: bool, force: bool, allow_unsafe: bool
) -> ModelRecord:
    if offer.error is not None and not (force and isinstance(offer.error, Conflict)):
        raise offer.error
    if offer.source is None or offer.reference is None:
        raise UsageError(f"'{offer.name}' cannot be taken over")
    told = _naming(listener, offer.name)
    source = offer.source.telling(told) if isinstance(offer.source, Ollama) else offer.source
    record = await pull_from(
        source,
        offer.reference,
        offer.name,
        store=store,
        gate=gate,
        listener=told,
        link=link,
        allow_unsafe=allow_unsafe,
    )
    for name in offer.names[1:]:
        if not force and await asyncio.to_thread(_means_another, store, name, record.digest):
            told(
                Note(message=f"'{name}' means another model here and stays with it; --force moves it", level="warning")
            )
        else:
            await asyncio.to_thread(store.tag, offer.name, name)
    return record


def _means_another(store: Store, name: str, digest: str) -> bool:
    try:
        found = store.get(name)
    except PierError:
        return False
    return found.name == name and found.digest != digest


def _naming(listener: Listener, name: str) -> Callable[[AnyEvent], None]:
    """Progress of files that tells whose they are: several models have a file of one name."""

    def listen(event: AnyEvent) -> None:
        named = isinstance(event, PullProgress)
        listener(msgspec.structs.replace(event, file=f"{name} {event.file[:40]}") if named else event)

    return listen
