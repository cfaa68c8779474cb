"""What a replica of a model is to be: which engine, which settings, which plan; places and starts nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from pierhead.config import FleetSettings
from pierhead.engines.base import Beside, Engine, Plan, PlanRequest
from pierhead.engines.gpus import Device
from pierhead.errors import NotFound, OutOfMemory, UsageError
from pierhead.fleet import compiled
from pierhead.fleet.holdings import Models
from pierhead.fleet.layers import Layers, of_engine
from pierhead.fleet.memory import processor_features
from pierhead.fleet.merge import values
from pierhead.fleet.peaks import Peaks, kind
from pierhead.fleet.replica import Replica
from pierhead.fleet.scheduler import Room
from pierhead.fleet.wish import Wish
from pierhead.store.model import ModelRecord, opening

_NOTHING: Mapping[str, Any] = {}
_ROOMY = 1 << 62  # bytes that everything fits in
SMALLEST = 512  # tokens: nothing is tried with a smaller context


class Planning:
    """Knows the engines, by the layers of settings, and the store; ``trusted`` raises for a model refused.

    Below ``adapters`` are the folders of replicas that load LoRAs while they run, below ``compiled`` those in which
    engines keep what they compile.
    """

    def __init__(
        self,
        store: Models,
        layers: Layers,
        trusted: Callable[[ModelRecord], object],
        fleet: FleetSettings,
        peaks: Peaks,
        adapters: Path,
        compiled: Path,
    ) -> None:
        self._store = store
        self.layers = layers
        self._trusted = trusted
        self._fleet = fleet
        self._peaks = peaks
        self._adapters = adapters
        self._compiled = compiled
        self._processor = processor_features()
        self._besides: dict[str, tuple[Beside, ...]] = {}  # by replica

    def engine(self, record: ModelRecord, asked: Mapping[str, Any] = _NOTHING) -> Engine:
        """The engine that serves this model, or the one that is ``asked`` for; UsageError when there is none."""
        return self.layers.engine(record, asked)

    def capabilities(self, record: ModelRecord) -> tuple[str, ...]:
        """What a model can do, by the engine that would serve it; empty where none does."""
        try:
            return () if record.damaged else self.engine(record).capabilities(record.laid_out, record.metadata)
        except UsageError:
            return ()

    def asked(self, record: ModelRecord, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        """What a user asked, in the words of the engine that is to serve; which one is a setting, too."""
        if not settings:
            return {}
        engine = {"engine": settings["engine"]} if settings.get("engine") else {}
        return engine | self.engine(record, settings).validate(of_engine(settings))

    def wish(self, record: ModelRecord, asked: Mapping[str, Any]) -> Wish:
        """What a model is started with, as all settings are now; UsageError for one that cannot be used."""
        engine = self.engine(record, asked)
        return Wish(engine.name, values(self.layers.settings(record, asked)), self.layers.adapters(record))

    def like(self, record: ModelRecord, first: Wish) -> Wish:
        """What one more replica of a model is started with: adapters that can come and go are those of now."""
        if not first.adapters or self.engine(record, first.picked).facts.lora != "runtime":
            return first
        return msgspec.structs.replace(first, adapters=self.layers.adapters(record) or first.adapters)

    def parallel(self, record: ModelRecord, wish: Wish) -> int:
        """Requests at a time."""
        return int(wish.settings.get("parallel", self.engine(record, wish.picked).facts.parallel))

    def hold(self, replica: Replica) -> Path:
        """Keep the store from removing the model while it runs; its folder. Untrusted where the policy refuses it."""
        folder = self._held(replica, replica.life.model, replica.id)
        beside = [self._at_hand(replica, at, *wanted) for at, wanted in enumerate(self._wanted(replica))]
        self._besides[replica.id] = tuple(beside)
        replica.life.lease.callback(self._besides.pop, replica.id, None)
        return folder

    def _held(self, replica: Replica, record: ModelRecord, owner: str) -> Path:
        self._trusted(record)
        self._store.pin(record.digest, owner)
        replica.life.lease.callback(self._store.unpin, owner)
        self._store.recheck(record)
        return self._store.materialize(record)

    def _wanted(self, replica: Replica) -> list[tuple[Literal["draft", "lora"], str, float]]:
        """The models that are to be beside it: role, name, scale."""
        model, wish = replica.life.model, _wish(replica)
        facts, found = self.engine(model, wish.picked).facts, list[tuple[Literal["draft", "lora"], str, float]]()
        if facts.speculative and isinstance(draft := wish.settings.get("draft"), str) and draft:
            found.append(("draft", draft, 1.0))
        if wish.adapters and not facts.lora:
            raise UsageError(
                f"{facts.title} cannot use LoRA adapters, and '{model.name}' has {', '.join(wish.adapters)}",
                hint=f"Take them out: pier lora rm {model.name} {next(iter(wish.adapters))}",
            )
        return [*found, *(("lora", name, scale) for name, scale in wish.adapters.items())]

    def _at_hand(self, replica: Replica, at: int, role: Literal["draft", "lora"], name: str, scale: float) -> Beside:
        try:
            record = self._store.get(name)
        except NotFound as exc:
            model = replica.life.model.name
            raise NotFound(
                f"'{model}' wants '{name}' beside it ({role}), which is not here",
                hint=f"Try `pier pull {name}`; `pier settings {model}` shows who wants it.",
            ) from exc
        folder = self._held(replica, record, f"{replica.id}-{at}")
        return Beside(role, name, folder, record.laid_out, record.metadata, scale)

    def lend(self, name: str) -> Beside:
        """A LoRA for a replica that runs; NotFound or Untrusted where there is none."""
        record = self._store.get(name)
        self._trusted(record)
        self._store.recheck(record)
        return Beside("lora", name, self._store.materialize(record), record.laid_out, record.metadata)

    def smaller(self, replica: Replica, folder: Path, room: Room, like: Plan | None = None) -> Plan:
        """The plan with as much context, as many slots and as much of a GPU as ``room`` allows, where less is allowed.

        OutOfMemory where that is too little. What a replica of the same kind was seen to use counts, if it is more. The
        context of a plan that it is to be ``like`` stays, whoever works on it.
        """
        try:
            return self._planned(replica, folder, room, _context(like), settle=True)
        except OutOfMemory:
            if like is not None:
                raise
            whole = self._planned(replica, folder, _roomy(room.devices), {})
            known = self.engine(replica.life.model, _wish(replica).picked).facts.common
            if self._fleet.shrink != "always" or not whole.context or "context" not in known:
                raise
        slots = self.parallel(replica.life.model, _wish(replica)) if "parallel" in known else 1
        for less in _fewer(whole.context, slots):
            with contextlib.suppress(OutOfMemory):
                fewer = {k: v for k, v in less.items() if k in known}
                return self._planned(replica, folder, room, fewer, settle=True)
        return self._planned(replica, folder, room, _context(whole), settle=True)  # refuses in the engine's words

    def whole(
        self, replica: Replica, folder: Path, like: Plan | None, devices: Sequence[Device]
    ) -> Callable[[Room], Plan]:
        """What plans with all that was asked for, or with the usual context, or not at all.

        ``like`` is a plan whose context it is to have, ``devices`` are the machine's.
        """
        full = self._planned(replica, folder, _roomy(devices), _context(like))

        def plan(room: Room) -> Plan:
            if full.memory <= room.memory and not full.devices:
                return full
            return self._planned(replica, folder, room, _context(full))  # refuses in the engine's words

        return plan

    def _planned(
        self, replica: Replica, folder: Path, room: Room, more: Mapping[str, Any], *, settle: bool = False
    ) -> Plan:
        model, wish = replica.life.model, _wish(replica)
        engine = self.engine(model, wish.picked)
        request = PlanRequest(
            replica=replica.id,
            model=model.plain,
            model_dir=folder,
            files=model.laid_out,
            metadata=model.metadata,
            settings={**wish.settings, **engine.validate(more)},
            free_memory=max(1, room.memory),  # 0 would mean: not known
            cpus=len(os.sched_getaffinity(0)),
            processor=self._processor,
            beside=self._besides.get(replica.id, ()),
            adapters=self._adapters / replica.id,
            devices=room.devices,
            settle=settle,
            opening=opening(model.packaged),
        )
        plan = engine.plan(request)
        _check_adapters(plan, request)
        plan = msgspec.structs.replace(plan, spec=compiled.keeping(plan.spec, self._compiled, model.digest))
        plan = msgspec.structs.replace(plan, notes=(*plan.notes, *_capped(plan, wish, model.metadata)))
        return self._as_seen(model.name, plan, kind(model.digest, plan.spec), room)

    def _as_seen(self, name: str, plan: Plan, key: str, room: Room) -> Plan:
        """The plan with what such replicas were seen to use, where that is more; OutOfMemory where it does not fit."""
        memory = max(plan.memory, self._peaks.of(key))
        devices = {device: max(need, self._peaks.on_devices(key)) for device, need in plan.devices.items()}
        free = {device.name: device.free for device in room.devices}
        short = [device for device in devices if device in free and devices[device] > free[device]]
        if memory > room.memory or short:
            seen, left = (devices[short[0]], free[short[0]]) if short else (memory, room.memory)
            raise OutOfMemory(
                f"'{name}' was seen to use {seen >> 20:,} MiB; {max(0, left) >> 20:,} MiB are free"
                + (f" on {short[0]}" if short else ""),
                hint="Try a smaller --context, or stop another model.",
                data={"needed": seen, "free": left, "context": plan.context, **({"device": short[0]} if short else {})},
            )
        return msgspec.structs.replace(plan, memory=memory, devices=devices)


def _roomy(devices: Sequence[Device]) -> Room:
    """What everything fits in."""
    return Room(_ROOMY, tuple(msgspec.structs.replace(d, free=_ROOMY) for d in devices))


def _wish(replica: Replica) -> Wish:
    wish = replica.life.wish
    assert wish is not None, "a replica is planned with the settings of its model's first start"
    return wish


def _capped(plan: Plan, wish: Wish, metadata: Mapping[str, Any]) -> Iterator[str]:
    """What is to be said where more context is asked for than the model knows."""
    asked, known = wish.settings.get("context"), metadata.get("context_length")
    if isinstance(asked, int) and isinstance(known, int) and asked > known == plan.context:
        yield f"the model knows {known:,} tokens, not {asked:,}: it starts with a context of {known:,}"


def _check_adapters(plan: Plan, request: PlanRequest) -> None:
    """UsageError when the engine did not take the adapters that the user wants."""
    missing = {b.name for b in request.beside if b.role == "lora"} - {a.name for a in plan.spec.adapters}
    if missing and plan.spec.loading is None:
        raise UsageError(
            f"the engine {plan.spec.engine} takes adapters from the model's own folder only, not {', '.join(missing)}",
            hint=f"Take them out: pier lora rm {request.model} {min(missing)}",
        )


def release(store: Models, living: Iterable[str]) -> None:
    """Let go what is kept for replicas that are not among the ``living``."""
    owners = {owner for owners in store.pinned().values() for owner in owners}
    for owner in owners:
        if owner.partition("-")[0] not in living:
            store.unpin(owner)


def unpin(store: Models, replica: str) -> None:
    """Let go all that is kept for one replica."""
    for owner in {owner for owners in store.pinned().values() for owner in owners}:
        if owner.partition("-")[0] == replica:
            store.unpin(owner)


def _fewer(context: int, parallel: int) -> Iterator[dict[str, int]]:
    """Ever less than this: first fewer slots, then a smaller context."""
    while parallel > 1 or context > SMALLEST:
        parallel, context = (parallel // 2, context) if parallel > 1 else (1, max(SMALLEST, context // 2))
        yield {"context": context, "parallel": parallel}


def _context(like: Plan | None) -> dict[str, Any]:
    """The setting for the context of a plan; some engines know none."""
    return {"context": like.context} if like is not None and like.context else {}
