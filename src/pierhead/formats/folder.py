"""The summary of a safetensors or DDUF model from its weights' headers and the small files beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pierhead.formats import dduf, hf_config, pictures, safetensors
from pierhead.formats.gguf_summary import MAX_LINE
from pierhead.formats.reading import File, Reading, document, exactly, json_object, text, unusable

MAX_CONFIG = 4 << 20
MAX_TOKENIZER_CONFIG = 16 << 20
MAX_TEMPLATE = 1 << 20
MAX_SHARDS = 4096
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_INDEX = ".safetensors.index.json"


def read_safetensors(weights: Sequence[File], beside: Mapping[str, File]) -> Reading[dict[str, Any]]:
    """Summary of a model in one or more files; ``beside`` are the folder's other files by name."""
    if len(weights) > MAX_SHARDS:
        unusable("safetensors", f"the model has {len(weights)} parts (at most {MAX_SHARDS} are accepted)")
    yield from _complete(weights, beside)
    headers: list[safetensors.Header] = []
    for file in weights:
        headers.append((yield from safetensors.read_header(file)))
    configs = yield from _documents(beside)
    if not configs.keys() & {"config.json", "model_index.json"}:
        parts = [pictures.of_safetensors(file.name, one) for file, one in zip(weights, headers, strict=True)]
        if (painter := pictures.summary(parts, "safetensors")) is not None:
            return painter
    return _summary("safetensors", headers, configs, len(weights))


def read_dduf(file: File) -> Reading[dict[str, Any]]:
    """Summary of a pipeline of diffusion models in one archive."""
    members = {m.name: m for m in (yield from dduf.read_directory(file))}
    index = members.get("model_index.json")
    if index is None or index.size > MAX_CONFIG:
        unusable(dduf.KIND, "it has no model_index.json, or one of an odd size")
    config = json_object(dduf.KIND, (yield from exactly(dduf.KIND, file, index.start, index.size)))
    headers: list[safetensors.Header] = []
    weights = 0
    for member in members.values():
        if member.name.endswith(".safetensors"):
            part = File(file.name, member.size)
            headers.append((yield from safetensors.read_header(part, member.start)))
        elif member.name.endswith(".gguf"):
            weights += member.size
    found = _summary("dduf", headers, {"model_index.json": config}, 1)
    found["weights_bytes"] += weights
    return found


def _complete(weights: Sequence[File], beside: Mapping[str, File]) -> Reading[None]:
    """CorruptData unless every part that the index or a part's name tells of is there."""
    names = {file.name for file in weights}
    for file in beside.values():
        if not file.name.endswith(_INDEX):
            continue
        listed: Any = (yield from document(file, safetensors.MAX_HEADER)).get("weight_map")
        if not isinstance(listed, dict):
            unusable("safetensors", f"{file.name} lists no weights")
        folder = file.name.rpartition("/")[0]
        wanted = {f"{folder}/{part}" if folder else str(part) for part in cast("dict[str, Any]", listed).values()}
        if missing := sorted(wanted - names):
            unusable(
                "safetensors", f"{len(missing)} of its parts are missing: {', '.join(missing)[:200]}", "Get all parts."
            )
    for name in names:
        found = _SHARD.fullmatch(name)
        count = int(found[3]) if found else 0
        if found and (count > MAX_SHARDS or not int(found[2])):
            unusable("safetensors", f"{name} claims to be one of {count} parts")
        for number in range(1, count + 1):
            part = f"{found[1]}-{number:05d}-of-{found[3]}.safetensors" if found else ""
            if part not in names:
                unusable("safetensors", f"{part} is missing", "Get all parts of the model.")


def _documents(beside: Mapping[str, File]) -> Reading[dict[str, Any]]:
    """The small files that tell about the model, read whole."""
    found: dict[str, Any] = {}
    for name in ("config.json", "model_index.json", "params.json"):
        if name in beside:
            found[name] = yield from document(beside[name], MAX_CONFIG)
    if "tokenizer_config.json" in beside:
        found["tokenizer_config.json"] = yield from document(beside["tokenizer_config.json"], MAX_TOKENIZER_CONFIG)
    if "chat_template.jinja" in beside:
        found["chat_template.jinja"] = (yield from text(beside["chat_template.jinja"], MAX_TEMPLATE)).decode(
            "utf-8", "replace"
        )
    elif "chat_template.json" in beside:
        found["chat_template.json"] = yield from document(beside["chat_template.json"], MAX_TEMPLATE)
    return found


def read_config(beside: Mapping[str, File]) -> Reading[dict[str, Any]]:
    """What the small files alone tell, for weights that tell nothing themselves."""
    return _about((yield from _documents(beside)))


def _about(documents: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = documents.get("config.json") or documents.get("model_index.json") or {}
    tokenizer: dict[str, Any] = documents.get("tokenizer_config.json") or {}
    words = tokenizer.get("tokenizer_class")
    return {
        **hf_config.shape(config),
        "tokenizer": words[:MAX_LINE] if isinstance(words, str) else None,
        "chat_template": _template(documents, tokenizer),
    }


def _template(documents: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str | None:
    """A file of its own counts before the tokenizer's config; of several named ones the default."""
    own = documents.get("chat_template.jinja")
    if isinstance(own, str):
        return own
    given: Any = documents.get("chat_template.json", {}).get("chat_template") or tokenizer.get("chat_template")
    if isinstance(given, list):
        named = [cast("dict[str, Any]", one) for one in cast("list[object]", given) if isinstance(one, dict)]
        chosen = [one for one in named if one.get("name") == "default"] or named
        given = chosen[0].get("template") if chosen else None
    return given if isinstance(given, str) and len(given) <= MAX_TEMPLATE else None


def _summary(
    kind: str, headers: Sequence[safetensors.Header], documents: Mapping[str, Any], shards: int
) -> dict[str, Any]:
    tensors = [tensor for header in headers for tensor in header.tensors]
    if kind == "safetensors" and len({t.name for t in tensors}) != len(tensors) and _one_model(documents):
        unusable("safetensors", "a tensor appears in two of its parts")
    share: dict[str, int] = {}
    for tensor in tensors:
        share[tensor.dtype] = share.get(tensor.dtype, 0) + tensor.nbytes
    config: dict[str, Any] = documents.get("config.json") or {}
    method, bits = hf_config.quantization(config)
    majority = max(share, key=lambda name: share[name], default="unknown")
    return {
        "format": kind,
        "version": None,
        **_about(documents),
        "name": None,
        "license": None,
        "size_label": None,
        "type": "model",
        "parameters": sum(_parameters(tensor, bits) for tensor in tensors),
        "quantization": method or majority,
        "dtypes": share,
        "weights_bytes": sum(tensor.nbytes for tensor in tensors),
        "tensor_count": len(tensors),
        "split_count": shards,
        "shards_read": shards,
        "feed_forward_length": None,
        "pooling": None,
        "state": {},
        "per_layer": [],
        "other": {},
    }


def _one_model(documents: Mapping[str, Any]) -> bool:
    """A pipeline has several models, whose tensors may share names."""
    return "model_index.json" not in documents


def _parameters(tensor: safetensors.Tensor, bits: int) -> int:
    """Elements; of packed ones as many as were packed into each."""
    packed = tensor.name.endswith(("qweight", "weight_packed", ".weight")) and tensor.dtype in ("I32", "U8", "I8")
    width = safetensors.DTYPES[tensor.dtype]
    return tensor.elements * (width // bits) if packed and 0 < bits < width else tensor.elements
