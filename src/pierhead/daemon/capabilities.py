"""What a model can do, in the words of Ollama's clients; pure."""

from __future__ import annotations

from collections.abc import Sequence


def in_ollamas_words(found: Sequence[str], *, insert: bool = False) -> list[str]:
    """The same as Ollama's clients look for it."""
    words = {"chat": "completion", "vision": "vision", "tools": "tools", "thinking": "thinking"}
    made = [words[name] for name in found if name in words]
    if "embeddings" in found and "chat" not in found:
        made.append("embedding")
    return made + (["insert"] if insert and "chat" in found else [])
