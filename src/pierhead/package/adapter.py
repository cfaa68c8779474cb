"""A LoRA adapter as an artifact of its own in the store; knows no model that it is for but its architecture."""

from __future__ import annotations

from pathlib import Path

from pierhead.errors import CorruptData
from pierhead.formats.gguf import read_file
from pierhead.store.files import os_errors
from pierhead.store.layout import Store
from pierhead.store.media import LORA
from pierhead.store.model import Layer, ModelRecord


def store_adapter(store: Store, file: Path, name: str) -> ModelRecord:
    """Copy (or reflink) a GGUF adapter into the store as ``name``; CorruptData when it is none."""
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
