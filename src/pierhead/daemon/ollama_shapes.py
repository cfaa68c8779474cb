"""Models of the store as Ollama's API tells of them: lists, details, a model's whole description; pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pierhead.daemon.capabilities import in_ollamas_words
from pierhead.fleet.info import ReplicaInfo
from pierhead.formats.gguf_parser import Header
from pierhead.package.modelfile import PARAMETERS
from pierhead.store.documents import human_count
from pierhead.store.model import ModelRecord

FOREVER = "2318-01-01T00:00:00Z"  # Ollama's clients want a time; this far away it means: never
_SHORT = 5  # longer arrays of a header are shown when asked for
_NAMES = {ours: theirs for theirs, ours in PARAMETERS.items()}
_FIM = ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")


def tagged(name: str) -> str:
    """A name with its tag, as Ollama lists it."""
    return name if ":" in name.rpartition("/")[2] or "@" in name else f"{name}:latest"


def folded(name: str) -> str:
    """A name as it is looked up: any case, the tag ``latest`` left out, the library's place left out."""
    name = name.lower().removesuffix(":latest")
    return name.removeprefix("registry.ollama.ai/").removeprefix("library/")


def details(model: ModelRecord) -> dict[str, Any]:
    """The short description that every list has."""
    facts = model.metadata
    family = str(facts.get("architecture") or "")
    return {
        "parent_model": model.annotations.get("org.opencontainers.image.base.name", ""),
        "format": str(facts.get("format") or "gguf"),
        "family": family,
        "families": [family] if family else [],
        "parameter_size": human_count(facts.get("parameters")),
        "quantization_level": str(facts.get("quantization") or ""),
    }


def listed(model: ModelRecord, abilities: Sequence[str]) -> list[dict[str, Any]]:
    """A model's entries of ``/api/tags``: one for each name, as Ollama has them."""
    shared = {
        "modified_at": model.created,
        "size": model.size,
        "digest": model.digest.removeprefix("sha256:"),
        "details": details(model),
        "capabilities": in_ollamas_words(abilities),
    }
    return [{"name": tagged(name), "model": tagged(name), **shared} for name in model.names]


def running(replica: ReplicaInfo, model: ModelRecord) -> dict[str, Any]:
    """An entry of ``/api/ps``."""
    on_gpus = sum(replica.devices.values())
    return {
        "name": tagged(model.name),
        "model": tagged(model.name),
        "size": replica.memory_estimate + on_gpus,
        "digest": model.digest.removeprefix("sha256:"),
        "details": details(model),
        "expires_at": replica.expires_at or FOREVER,
        "size_vram": on_gpus,
        "context_length": replica.context,
    }


def shown(
    model: ModelRecord, header: Header | None, texts: Mapping[str, str], abilities: Sequence[str], *, verbose: bool
) -> dict[str, Any]:
    """The answer of ``/api/show``; ``texts`` has ``license`` and ``template`` as files of the model hold them."""
    template = texts.get("template") or str(model.metadata.get("chat_template") or "")
    parameters = _parameters(model)
    insert = header is not None and any(key in header.metadata for key in _FIM)
    answer: dict[str, Any] = {
        "license": texts.get("license") or str(model.metadata.get("license") or ""),
        "modelfile": _modelfile(model, template, parameters, texts.get("license", "")),
        "parameters": "\n".join(f"{name:<30} {value}" for name, value in parameters),
        "template": template,
        "system": model.packaged.system,
        "details": details(model),
        "messages": list(model.packaged.messages),
        "model_info": _info(header, verbose=verbose) if header is not None else {},
        "capabilities": in_ollamas_words(abilities, insert=insert),
        "modified_at": model.created,
    }
    if verbose and header is not None:
        tensors = [{"name": t.name, "type": t.type.name, "shape": list(t.shape)} for t in header.tensors]
        answer["tensors"] = tensors
    return {k: v for k, v in answer.items() if v not in ("", [])}


def _info(header: Header, *, verbose: bool) -> dict[str, Any]:
    """The weights' metadata without their name and template; long arrays only where asked for and kept."""
    info: dict[str, Any] = {}
    for key, value in header.metadata.items():
        if key not in ("general.name", "tokenizer.chat_template"):
            info[key] = list(value) if isinstance(value, tuple) and (verbose or len(value) <= _SHORT) else value
            if isinstance(value, tuple) and not isinstance(info[key], list):
                info[key] = []
    info |= {key: [] for key in header.arrays if key not in info}
    info["general.parameter_count"] = sum(t.elements for t in header.tensors)
    return info


def _parameters(model: ModelRecord) -> list[tuple[str, str]]:
    """What the model was packaged with, by Ollama's names, where it has one."""
    found = [("num_ctx", str(model.packaged.context))] if model.packaged.context else []
    for key, value in sorted(model.packaged.options.items()):
        name = _NAMES.get(key)
        if name is not None:
            many = cast("list[Any]", value) if isinstance(value, list) else [value]
            found += [(name, json.dumps(v) if isinstance(v, str) and name == "stop" else str(v)) for v in many]
    return found


def _modelfile(model: ModelRecord, template: str, parameters: list[tuple[str, str]], licence: str) -> str:
    """Text that ``pier package -f`` would make the same model from."""
    lines = [f"FROM {model.name}"]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    if model.packaged.system:
        lines.append(f'SYSTEM """{model.packaged.system}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in parameters]
    lines += [f'MESSAGE {m["role"]} """{m["content"]}"""' for m in model.packaged.messages]
    if licence:
        lines.append(f'LICENSE """{licence}"""')
    return "\n".join(lines) + "\n"
