"""The file that makes a folder of Python a model: which class of which module is served, and what it needs; pure.

It is written when the model is packaged, by reading the sources and not by running them, so that whoever has the model
knows what it offers before any of its code runs.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pierhead.errors import CorruptData

NAME = "pierhead-python.json"
FORMAT = "python"
MAX_SIZE = 1 << 20
# The methods that can be served → the gateway's operation, which is also the word for it in ``/v1/models``.
OPERATIONS: dict[str, str] = {
    "chat": "chat",
    "complete": "completions",
    "embed": "embeddings",
    "classify": "classify",
    "rerank": "rerank",
    "transcribe": "transcriptions",
    "infer": "infer",
    "predict": "predict",
}


class PythonModel(msgspec.Struct, frozen=True, kw_only=True):
    """``requirements`` are the author's, ``locked`` all that they and the server led to on ``locked_for``.

    ``python`` is what the author says of Python's version. ``tensors``: ``predict`` takes arrays. ``settings`` are the
    engine's that the author wrote beside the class.
    """

    schema: int = 1
    module: str
    cls: str = msgspec.field(name="class")
    methods: tuple[str, ...]
    tensors: bool = False
    python: str = ""
    requirements: tuple[str, ...] = ()
    locked: tuple[str, ...] = ()
    locked_for: str = ""
    settings: dict[str, Any] = {}

    @property
    def serves(self) -> tuple[str, ...]:
        """The operations that it answers."""
        found = [OPERATIONS[name] for name in OPERATIONS if name in self.methods]
        return tuple([*found, "infer"] if self.tensors and "infer" not in found else found)


def decode(data: bytes) -> PythonModel:
    """CorruptData where it is not such a file."""
    try:
        found = msgspec.json.decode(data, type=PythonModel)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise CorruptData(f"{NAME} cannot be read: {exc}", hint="Package the model again.") from exc
    parts = found.module.split(".")
    texts = (*found.requirements, *found.locked)
    if found.schema != 1:
        raise CorruptData(f"{NAME} is of a newer kind ({found.schema})", hint="Update Pierhead.")
    if not all(part.isidentifier() for part in (*parts, found.cls)) or not set(found.methods) & set(OPERATIONS):
        raise CorruptData(f"{NAME} names no class that can be served", hint="Package the model again.")
    if any(not text or text[0] in "-./" or any(ord(c) < 32 for c in text) for text in texts):
        raise CorruptData(f"{NAME} asks for a requirement that is none", hint="Package the model again.")
    return found


def of_summary(metadata: Any) -> PythonModel:
    """The one in a model's summary."""
    return msgspec.convert(metadata.get("python"), PythonModel)
