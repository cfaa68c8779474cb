"""What the engine that would serve a model of the store would claim for it, by its own plan; starts nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pierhead.cli.models import open_store
from pierhead.cli.output import settings
from pierhead.errors import PierError
from pierhead.fleet.memory import processor_features
from pierhead.paths import Paths


def planned(paths: Paths, model: str, *, context: int | None, parallel: int) -> dict[str, Any]:
    """``engine``, ``context`` (0: it has none), ``parallel`` and the ``total`` of bytes; empty where none can say.

    With the settings that hold for the model, and of the machine's own memory only.
    """
    from pierhead.daemon.modelbook import ModelBook
    from pierhead.engines.base import PlanRequest
    from pierhead.engines.registry import engines
    from pierhead.fleet.layers import Layers
    from pierhead.fleet.merge import values

    loaded, book = settings(paths), ModelBook(paths.config / "models.toml")
    book.refresh()
    record = open_store(paths).get(model)
    layers = Layers(engines(loaded.settings), loaded, lambda: book.current)
    try:
        engine = layers.engine(record)
        wanted = {"context": context, "parallel": parallel if parallel > 1 else None}
        asked = {k: v for k, v in wanted.items() if v and k in engine.facts.common}
        known = values(layers.settings(record, asked))
        plan = engine.plan(
            PlanRequest(
                replica="inspect",
                model=record.plain,
                model_dir=Path("/"),
                files=record.laid_out,
                metadata=record.metadata,
                settings=known,
                cpus=len(os.sched_getaffinity(0)),
                processor=processor_features(),
            )
        )
    except PierError:  # whoever starts it hears why
        return {}
    slots = plan.parallel or int(known.get("parallel") or engine.facts.parallel)
    return {"engine": engine.name, "context": plan.context, "parallel": slots, "total": plan.memory}
