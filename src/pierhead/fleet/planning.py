"""What a replica of a model is to be: which engine, which settings, which plan; places and starts nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pierhead.config import EngineSettings
from pierhead.engines.base import Engine, Plan, PlanRequest
from pierhead.engines.registry import choose
from pierhead.errors import UsageError
from pierhead.fleet.holdings import Models
from pierhead.fleet.memory import processor_features
from pierhead.fleet.replica import Replica
from pierhead.store.model import ModelRecord, opening

_NOTHING: Mapping[str, Any] = {}


class Planning:
    """Knows the engines, the configuration's settings and the store; ``trusted`` raises for a model refused."""

    def __init__(
        self,
        store: Models,
        engines: Sequence[Engine],
        settings: EngineSettings,
        trusted: Callable[[ModelRecord], object],
    ) -> None:
        self._store = store
        self._engines = engines
        self._settings = settings
        self._trusted = trusted
        self._processor = processor_features()

    def engine(self, record: ModelRecord, asked: Mapping[str, Any] = _NOTHING) -> Engine:
        """The engine that serves this model, or the one that is ``asked`` for; UsageError when there is none."""
        wanted = asked.get("engine") or record.packaged.options.get("engine") or ""
        return choose(self._engines, record.laid_out, str(wanted), record.name)

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
        return engine | self.engine(record, settings).validate(_of_engine(settings))

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

        OutOfMemory when they are too few.
        """
        model = replica.life.model
        asked = replica.life.intent.settings | ({"context": like.context} if like is not None and like.context else {})
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
        return self.engine(model, asked).plan(request)

    def _whole(self, model: ModelRecord, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration's settings, over them those that the model was packaged with, over them what is asked."""
        ours, engine = self._settings, self.engine(model, asked)
        defaults = {"context": ours.context, "parallel": ours.parallel, "threads": ours.threads}
        packaged = {**({"context": model.packaged.context} if model.packaged.context else {}), **model.packaged.options}
        found = engine.validate({k: v for k, v in defaults.items() if v and k in engine.facts.common})
        for layer in (ours.options, packaged, asked):  # each in the engine's own words, so that the last one counts
            found |= engine.validate(_of_engine(layer))
        return found


def _of_engine(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the engine itself understands."""
    return {name: value for name, value in settings.items() if name != "engine"}
