"""What the gateway is told to serve: routes made of models and replicas; pure."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec.structs import replace

from pierhead.fleet.info import ReplicaInfo
from pierhead.gateway.link import OPENAI, Endpoint, Route
from pierhead.store.model import ModelRecord

# llama.cpp forgets which of its LoRAs a prompt in its cache was worked out with: without one, it would go on with that.
_UNCACHED = '"cache_prompt":false,'
PLUS = "+"  # between the name of a model and that of the LoRA that is to count
Adapters = Callable[[ModelRecord], Mapping[str, float]]
# Types of ONNX as the Open Inference Protocol calls them.
DATATYPES = {
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bool": "BOOL",
    "string": "BYTES",
    **{f"{sign}int{bits}": f"{sign}int{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
Abilities = Callable[[ModelRecord], tuple[str, ...]]


def routes(
    models: Iterable[ModelRecord],
    replicas: Iterable[ReplicaInfo],
    abilities: Abilities,
    adapters: Adapters = lambda model: {},
) -> tuple[Route, ...]:
    """One route per model; its other names are aliases, its ready replicas endpoints; ``abilities`` of each model.

    One more for each of its LoRA ``adapters`` (name to scale): ``MODEL+ADAPTER``.
    """
    ready: dict[str, list[ReplicaInfo]] = {}
    for replica in replicas:
        if replica.state == "ready" and replica.socket:
            ready.setdefault(replica.digest, []).append(replica)
    made: dict[str, Route] = {}
    for model in models:
        if model.digest not in made and not model.adapter:
            made[model.digest] = Route(
                name=model.name,
                aliases=tuple(sorted(_spellings(model) - {model.name})),
                endpoints=tuple(map(endpoint, ready.get(model.digest, ()))),
                card=_card(model, abilities(model)),
                docker=_docker(model),
            )
            for name, scale in adapters(model).items():
                made[f"{model.digest}+{name}"] = _adapted(model, name, scale, ready.get(model.digest, ()), abilities)
    return tuple(made.values())


def _adapted(
    model: ModelRecord, name: str, scale: float, replicas: Iterable[ReplicaInfo], abilities: Abilities
) -> Route:
    """The route of a model with one of its LoRAs."""
    found = tuple(e for r in replicas if (e := with_adapter(r, name, scale)) is not None)
    full = f"{model.name}{PLUS}{name}"
    card = {**_card(model, tuple(w for w in abilities(model) if w != "embeddings")), "id": full, "parent": model.name}
    aliases = {f"{spelling}{PLUS}{name}" for spelling in _spellings(model)} - {full}
    return Route(name=full, aliases=tuple(sorted(aliases)), endpoints=found, card=card, docker={})


def with_adapter(replica: ReplicaInfo, name: str, scale: float) -> Endpoint | None:
    """Where the gateway finds a replica that uses one of its LoRAs; None where it was started without it."""
    adapter = next((a for a in replica.adapters if a.name == name), None)
    if adapter is None:
        return None
    made = replace(endpoint(replica), serves=tuple(s for s in endpoint(replica).serves if s != "embeddings"))
    if adapter.model:
        return replace(made, model=adapter.model)
    counting = [{"id": at, "scale": fixed} for at, fixed in replica.fixed] + [{"id": adapter.id, "scale": scale}]
    return replace(made, front=f'{_UNCACHED}"lora":{msgspec.json.encode(counting).decode()},')


def endpoint(replica: ReplicaInfo) -> Endpoint:
    """Where the gateway finds a replica."""
    return Endpoint(
        replica=replica.id,
        socket=replica.socket,
        call_prefix=replica.call_prefix,
        serves=replica.serves or OPENAI,  # a replica that an earlier version started did not say
        slots=replica.parallel,
        context=replica.context,
        front=_UNCACHED if any(adapter.id >= 0 for adapter in replica.adapters) else "",
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
    """The entry of ``/v1/models``; ``context_length`` is the model's own, in tokens, ``embedding_length`` numbers."""
    card: dict[str, Any] = {"id": model.name, "object": "model", "created": _created(model), "owned_by": "pierhead"}
    if found:
        card["capabilities"] = list(found)
    if model.metadata.get("format") == "python":
        card["openapi"] = f"/v1/models/{quote(model.name, safe='/:')}/openapi.json"
    if "infer" in found and (tensors := _tensors(model.metadata)):
        card["tensors"] = tensors
    length = model.metadata.get("embedding_length") if "embeddings" in found else None
    card |= {"embedding_length": length} if isinstance(length, int) and length > 0 else {}
    context = model.packaged.context or model.metadata.get("context_length")
    return card | ({"context_length": context} if isinstance(context, int) and context > 0 else {})


def _tensors(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs and outputs of an ONNX graph in the words of KServe's protocol; a free dimension is -1."""

    def port(found: Mapping[str, Any]) -> dict[str, Any]:
        shape = [size if isinstance(size, int) else -1 for size in found.get("shape") or ()]
        return {"name": found["name"], "datatype": DATATYPES.get(found.get("type", ""), ""), "shape": shape}

    sides = {side: [port(one) for one in facts.get(side) or ()][:64] for side in ("inputs", "outputs")}
    return sides if all(sides.values()) else {}


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
