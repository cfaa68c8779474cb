"""What the gateway is told to serve: routes made of models and replicas; pure."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from typing import Any

from pierhead.fleet.info import ReplicaInfo
from pierhead.gateway.link import OPENAI, Endpoint, Route
from pierhead.store.model import ModelRecord

Abilities = Callable[[ModelRecord], tuple[str, ...]]


def routes(models: Iterable[ModelRecord], replicas: Iterable[ReplicaInfo], abilities: Abilities) -> tuple[Route, ...]:
    """One route per model; its other names are aliases, its ready replicas endpoints; ``abilities`` of each model."""
    endpoints: dict[str, tuple[Endpoint, ...]] = {}
    for replica in replicas:
        if replica.state == "ready" and replica.socket:
            endpoints[replica.digest] = (
                *endpoints.get(replica.digest, ()),
                endpoint(replica),
            )
    made: dict[str, Route] = {}
    for model in models:
        if model.digest not in made:
            made[model.digest] = Route(
                name=model.name,
                aliases=tuple(sorted(_spellings(model) - {model.name})),
                endpoints=endpoints.get(model.digest, ()),
                card=_card(model, abilities(model)),
                docker=_docker(model),
            )
    return tuple(made.values())


def endpoint(replica: ReplicaInfo) -> Endpoint:
    """Where the gateway finds a replica."""
    return Endpoint(
        replica=replica.id,
        socket=replica.socket,
        call_prefix=replica.call_prefix,
        serves=replica.serves or OPENAI,  # a replica that an earlier version started did not say
        slots=replica.parallel,
        context=replica.context,
        revision=replica.digest.removeprefix("sha256:")[:12],
        model=replica.called,
    )


def _spellings(model: ModelRecord) -> set[str]:
    names = {model.name, *model.names}
    short = {n.removesuffix(":latest") for n in names}
    return names | short | {f"{n}:latest" for n in short if ":" not in n.rpartition("/")[2]} | {model.digest}


def _created(model: ModelRecord) -> int:
    try:
        return int(datetime.datetime.fromisoformat(model.created).timestamp())
    except ValueError:
        return 0


def _card(model: ModelRecord, found: tuple[str, ...]) -> dict[str, Any]:
    """The entry of ``/v1/models``; ``context_length`` is the model's own, in tokens."""
    card: dict[str, Any] = {"id": model.name, "object": "model", "created": _created(model), "owned_by": "pierhead"}
    if found:
        card["capabilities"] = list(found)
    context = model.packaged.context or model.metadata.get("context_length")
    return card | ({"context_length": context} if isinstance(context, int) and context > 0 else {})


def _docker(model: ModelRecord) -> dict[str, Any]:
    facts = model.metadata
    config = {
        "format": facts.get("format", "gguf"),
        "quantization": facts.get("quantization", ""),
        "parameters": _short_count(facts.get("parameters", 0)),
        "architecture": facts.get("architecture", ""),
        "size": f"{model.size / 1e6:.2f} MB",
    }
    return {"id": model.digest, "tags": sorted(model.names), "created": _created(model), "config": config}


def _short_count(value: Any) -> str:
    count = float(value) if isinstance(value, (int, float)) else 0.0
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(int(count))
