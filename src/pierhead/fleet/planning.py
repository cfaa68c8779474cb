"""What a replica of a model is to be: which engine, which settings, which plan; places and starts nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pierhead.config import FleetSettings
from pierhead.engines.base import Engine, Plan, PlanRequest
from pierhead.errors import OutOfMemory, UsageError
from pierhead.fleet.holdings import Models
from pierhead.fleet.layers import Layers, of_engine
from pierhead.fleet.memory import processor_features
from pierhead.fleet.merge import values
from pierhead.fleet.peaks import Peaks, kind
from pierhead.fleet.replica import Replica
from pierhead.store.model import ModelRecord, opening

_NOTHING: Mapping[str, Any] = {}
ROOMY = 1 << 62  # bytes that everything fits in
SMALLEST = 512  # tokens: nothing is tried with a smaller context


class Planning:
    """Knows the engines, by the layers of settings, and the store; ``trusted`` raises for a model refused."""

    def __init__(
        self,
        store: Models,
        layers: Layers,
        trusted: Callable[[ModelRecord], object],
        fleet: FleetSettings,
        peaks: Peaks,
    ) -> None:
        self._store = store
        self.layers = layers
        self._trusted = trusted
        self._fleet = fleet
        self._peaks = peaks
        self._processor = processor_features()

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

    def parallel(self, record: ModelRecord, asked: Mapping[str, Any]) -> int:
        """Requests at a time. A model whose packaged settings cannot be used is refused when it is planned."""
        with contextlib.suppress(UsageError):
            return int(self._whole(record, asked).get("parallel", self.engine(record, asked).facts.parallel))
        return 1

    def hold(self, replica: Replica) -> Path:
        """Keep the store from removing the model while it runs; its folder. Untrusted where the policy refuses it."""
        record = replica.life.model
        self._trusted(record)
        self._store.pin(record.digest, replica.id)
        replica.life.lease.callback(self._store.unpin, replica.id)
        self._store.recheck(record)
        return self._store.materialize(record)

    def plan(self, replica: Replica, folder: Path, free: int, like: Plan | None = None) -> Plan:
        """The plan for ``free`` bytes of memory, with the context of the plan it is to be ``like``.

        OutOfMemory when they are too few. What a replica of the same kind was seen to use counts, if it is more.
        """
        return self._planned(replica, folder, free, _context(like))

    def smaller(self, replica: Replica, folder: Path, free: int) -> Plan:
        """The plan with as much context and as many slots as ``free`` bytes allow, where the user allowed less."""
        try:
            return self._planned(replica, folder, free, {})
        except OutOfMemory:
            whole = self._planned(replica, folder, ROOMY, {})
            if self._fleet.shrink != "always" or not whole.context:
                raise
        context, parallel = whole.context, self.parallel(replica.life.model, replica.life.intent.settings)
        while parallel > 1 or context > SMALLEST:
            parallel, context = (parallel // 2, context) if parallel > 1 else (1, max(SMALLEST, context // 2))
            with contextlib.suppress(OutOfMemory):
                return self._planned(replica, folder, free, {"context": context, "parallel": parallel})
        return self._planned(replica, folder, free, {"context": context, "parallel": parallel})

    def whole(self, replica: Replica, folder: Path, like: Plan | None) -> Callable[[int], Plan]:
        """What plans with all that was asked for, or with the usual context, or not at all."""
        full = self.plan(replica, folder, ROOMY, like)

        def plan(free: int) -> Plan:
            if full.memory <= free:
                return full
            return self._planned(replica, folder, free, _context(full))  # refuses in the engine's words

        return plan

    def _planned(self, replica: Replica, folder: Path, free: int, more: Mapping[str, Any]) -> Plan:
        model = replica.life.model
        asked = {**replica.life.intent.settings, **more}
        request = PlanRequest(
            replica=replica.id,
            model=model.name,
            model_dir=folder,
            files=model.laid_out,
            metadata=model.metadata,
            settings=self._whole(model, asked),
            free_memory=max(1, free),  # 0 would mean: not known
            cpus=len(os.sched_getaffinity(0)),
            processor=self._processor,
            opening=opening(model.packaged),
        )
        plan = self.engine(model, asked).plan(request)
        seen = self._peaks.of(kind(model.digest, plan.spec))
        if seen > plan.memory:
            plan = msgspec.structs.replace(plan, memory=seen)
        if plan.memory > free:
            raise OutOfMemory(
                f"'{model.name}' was seen to use {seen >> 20:,} MiB; {max(0, free) >> 20:,} MiB are free",
                hint="Try a smaller --context, or stop another model.",
                data={"needed": plan.memory, "free": free, "context": plan.context},
            )
        return plan

    def _whole(self, model: ModelRecord, asked: Mapping[str, Any]) -> dict[str, Any]:
        """All settings that hold, over all layers."""
        return values(self.layers.settings(model, asked))


def _context(like: Plan | None) -> dict[str, Any]:
    """The setting for the context of a plan; some engines know none."""
    return {"context": like.context} if like is not None and like.context else {}
