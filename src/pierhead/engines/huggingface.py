"""Models in Hugging Face's layout, as the engines that read it see them: what they are and what they can do; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pierhead.store.model import ModelFile

_THINKS = ("enable_thinking", "<think>", "reasoning_content", "reasoning_effort")
_SEES = ("vl", "vision", "llava", "pixtral", "multimodal", "gemma3", "mllama", "internvl")
ADAPTER = "adapter_config.json"


def is_model(files: tuple[ModelFile, ...]) -> bool:
    """Whether there are safetensors weights of one model; a pipeline of several (pictures) has an index of its own."""
    names = {f.name for f in files}
    return "model_index.json" not in names and any(_own(f) and f.format == "safetensors" for f in files)


def adapters(files: tuple[ModelFile, ...]) -> dict[str, str]:
    """LoRA adapters that come with a model, as PEFT saves them: name to folder inside the model's folder."""
    folders = [f.name.rpartition("/")[0] for f in files if f.name.endswith(f"/{ADAPTER}")]
    return {folder.rpartition("/")[2]: folder for folder in sorted(folders)}


def kind(metadata: Mapping[str, Any]) -> str:
    """``chat``, ``write`` (no chat template), ``embed``, ``classify`` or ``rank``, by its class and config."""
    name = str(metadata.get("class") or "")
    if "Classification" in name or "RewardModel" in name:
        return "rank" if metadata.get("labels") == 1 else "classify"
    if metadata.get("causal") is False or (name.endswith(("Model", "ForMaskedLM")) and "Head" not in name):
        return "embed"
    return "chat" if str(metadata.get("chat_template") or "").strip() else "write"


def say(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """In the words of ``Engine.capabilities``."""
    found = {
        "classify": ("classify",),
        "rank": ("rerank",),
        "embed": ("embeddings",),
        "write": ("completions",),
        "chat": ("chat", "completions"),
    }[kind(metadata)]
    if found[0] != "chat":
        return found
    template, words = str(metadata.get("chat_template")), [*found]
    architecture = str(metadata.get("architecture") or "").lower()
    if "ForConditionalGeneration" in str(metadata.get("class")) and any(word in architecture for word in _SEES):
        words.append("vision")
    if "tools" in template:
        words.append("tools")
    if any(word in template for word in _THINKS):
        words.append("thinking")
    return tuple(words)


def _own(file: ModelFile) -> bool:
    """Whether it is weights of the model itself, and not of an adapter in a folder beside them."""
    return file.role == "weights" and not file.name.rpartition("/")[2].startswith("adapter_")
