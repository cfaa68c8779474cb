"""A LoRA adapter as an artifact of its own in the store; knows no model that it is for but its architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from pierhead.errors import CorruptData, NotFound
from pierhead.formats.gguf import read_file
from pierhead.formats.summarize import check_file
from pierhead.store.files import os_errors
from pierhead.store.layout import Store
from pierhead.store.media import FILE, LORA, docker_type
from pierhead.store.model import Layer, ModelRecord

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MOST = 1 << 20  # bytes of an adapter's config
_LARGEST = 1 << 16  # a rank beyond this is none


def store_adapter(store: Store, place: Path, name: str) -> ModelRecord:
    """Copy (or reflink) an adapter into the store as ``name``: a GGUF file, or a folder as PEFT saves one.

    CorruptData when it is none.
    """
    return _folder(store, place, name) if place.is_dir() else _file(store, place, name)


def _file(store: Store, file: Path, name: str) -> ModelRecord:
    with os_errors(f"cannot read {file}"):
        about = read_file(file).metadata
    if about.get("general.type") != "adapter" or about.get("adapter.type", "lora") != "lora":
        raise CorruptData(
            f"{file} is not a LoRA: its header says {about.get('general.type') or 'nothing of one'}",
            hint="Make one from safetensors with llama.cpp's convert_lora_to_gguf.py.",
        )
    blob = store.adopt_file(file)
    layer = Layer(blob.digest, blob.size, LORA, f"{file.stem}.gguf", role="lora")
    facts = {"format": "gguf", "architecture": str(about.get("general.architecture") or ""), "adapter": "lora"}
    return store.commit_model(name, layers=[layer], metadata=facts, by="lora add")


def _folder(store: Store, folder: Path, name: str) -> ModelRecord:
    config, weights = folder / CONFIG, folder / WEIGHTS
    if not config.is_file() or not weights.is_file():
        raise NotFound(
            f"{folder} is not a LoRA as PEFT saves one: it needs {CONFIG} and {WEIGHTS}",
            hint="Weights as .bin are pickles, which may run code: save them with safe_serialization=True.",
        )
    facts = _facts(config)
    check_file(weights, "safetensors", WEIGHTS)
    layers: list[Layer] = []
    for file, kind in ((weights, docker_type("weights", "safetensors")), (config, FILE)):
        blob = store.adopt_file(file)
        layers.append(Layer(blob.digest, blob.size, kind, file.name, role="lora"))
    return store.commit_model(name, layers=layers, metadata=facts, by="lora add")


def _facts(config: Path) -> dict[str, Any]:
    """What a config tells; CorruptData where it is not that of a LoRA."""
    with os_errors(f"cannot read {config}"):
        text = config.read_bytes()[: _MOST + 1]
    try:
        told: Any = json.loads(text) if len(text) <= _MOST else None
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise CorruptData(f"{config} is not a JSON object", hint="PEFT writes one beside an adapter's weights.")
    found = cast("dict[str, Any]", told)
    ranks: list[Any] = [found.get("r"), *cast("dict[str, Any]", found.get("rank_pattern") or {}).values()]
    if found.get("peft_type") != "LORA" or not all(type(r) is int and 0 < r <= _LARGEST for r in ranks):
        raise CorruptData(f"{config} is not that of a LoRA: its peft_type is {str(found.get('peft_type'))[:40]!r}")
    return {"format": "safetensors", "architecture": "", "adapter": "lora", "rank": max(ranks)}
