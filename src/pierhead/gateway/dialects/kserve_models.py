"""What the Open Inference Protocol tells of the server and its models, truthfully; pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from pierhead import __version__

Role = Literal["text", "embedding", "rerank", ""]
EXTENSIONS = ("binary_tensor_data", "generate")
_TEXTS = {"datatype": "BYTES", "shape": [-1]}
_INPUTS: dict[str, list[dict[str, Any]]] = {
    "text": [{"name": "text_input", **_TEXTS}],
    "embedding": [{"name": "text_input", **_TEXTS}],
    "rerank": [{"name": "query", "datatype": "BYTES", "shape": [1]}, {"name": "documents", **_TEXTS}],
}
_OUTPUTS: dict[str, list[dict[str, Any]]] = {
    "text": [{"name": "text_output", **_TEXTS}],
    "embedding": [{"name": "embedding", "datatype": "FP32", "shape": [-1, -1]}],
    "rerank": [{"name": "score", "datatype": "FP32", "shape": [-1]}],
}


def role(able: Collection[str]) -> Role:
    """What a model is for, by its capabilities, or by what its engine serves."""
    if "completions" in able:
        return "text"
    if "embeddings" in able:
        return "embedding"
    return "rerank" if "rerank" in able or "llamacpp-rerank" in able else ""


def server() -> dict[str, Any]:
    """The server's metadata."""
    return {"name": "pierhead", "version": __version__, "extensions": list(EXTENSIONS)}


def metadata(card: Mapping[str, Any]) -> dict[str, Any]:
    """A model's metadata; without tensors where it is not known what the model does."""
    able: Any = card.get("capabilities") or ()
    kind = role(able)
    inputs: Any = _INPUTS.get(kind, [])
    outputs: Any = _OUTPUTS.get(kind, [])
    if not kind and "infer" in able:
        inputs, outputs = (_INPUTS["text"], []) if "classify" in able else _ports(card)
    return {"name": card["id"], "platform": "pierhead", "inputs": inputs, "outputs": outputs}


def _ports(card: Mapping[str, Any]) -> tuple[Any, Any]:
    """The tensors of the model's own graph, which its card names."""
    tensors: Any = card.get("tensors") or {}
    return tensors.get("inputs", []), tensors.get("outputs", [])
