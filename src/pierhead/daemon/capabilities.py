"""What a model can do, from what the store knows of it, in the words of ``/v1/models`` and of Ollama; pure."""

from __future__ import annotations

from collections.abc import Sequence

from pierhead.store.model import ModelRecord

_RANK = 4  # llama.cpp's number for pooling that ranks
_THINKS = ("enable_thinking", "<think>", "reasoning_content", "reasoning_effort")


def capabilities(model: ModelRecord) -> tuple[str, ...]:
    """``chat``, ``completions``, ``embeddings``, ``rerank``, ``vision``, ``tools``, ``thinking``: what holds of them.

    Empty where no engine serves its weights.
    """
    facts = model.metadata
    if facts.get("format", "gguf") != "gguf" or model.damaged:
        return ()
    pooling = facts.get("pooling")
    if pooling == _RANK:
        return ("rerank",)
    if pooling:
        return ("embeddings",)
    found = ["chat", "completions", "embeddings"]
    template = str(facts.get("chat_template") or "")
    if any(file.role == "mmproj" for file in model.laid_out):
        found.append("vision")
    if template.strip():
        found.append("tools")  # a template that knows none is taught them when the model starts
    if any(word in template for word in _THINKS):
        found.append("thinking")
    return tuple(found)


def in_ollamas_words(found: Sequence[str], *, insert: bool = False) -> list[str]:
    """The same as Ollama's clients look for it."""
    words = {"chat": "completion", "vision": "vision", "tools": "tools", "thinking": "thinking"}
    made = [words[name] for name in found if name in words]
    if "embeddings" in found and "chat" not in found:
        made.append("embedding")
    return made + (["insert"] if insert and "chat" in found else [])
