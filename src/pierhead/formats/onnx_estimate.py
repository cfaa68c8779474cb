"""How much memory a model takes when ONNX Runtime serves it: weights, one batch's activations, the program; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Resident memory of the server with a model whose weights are next to nothing: Python, ONNX Runtime, the tokenizer.
PROGRAM = 96 << 20

# What a graph of which only the inputs are known needs to work. This margin is not measured.
UNKNOWN_SCRATCH = 128 << 20

_FLOAT = 4  # bytes: activations of quantized models are float32, too


@dataclass(frozen=True)
class OnnxEstimate:
    """Bytes. ``compute`` is the scratch memory of the largest batch; ONNX Runtime keeps it for the next one."""

    weights: int
    compute: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.compute + self.overhead

    def to_dict(self) -> dict[str, int]:
        """JSON-safe form: the parts and their ``total``."""
        return {**asdict(self), "total": self.total}


def estimate_onnx(
    metadata: Mapping[str, Any], *, tokens: int, sequence: int, workers: int = 1, vocabulary: int = 0
) -> OnnxEstimate:
    """For batches of at most ``tokens`` tokens in texts of at most ``sequence``; ``workers`` batches run at a time.

    ``vocabulary`` is the size of the tokenizer's file in bytes, which takes several times as much once it is read.
    """
    weights = _count(metadata, "weights_bytes")
    return OnnxEstimate(weights, workers * _compute(metadata, tokens, sequence), PROGRAM + 8 * vocabulary)


def _compute(metadata: Mapping[str, Any], tokens: int, sequence: int) -> int:
    """Attention keeps scores and their softmax for every pair of tokens in a text; the rest is a few wide rows."""
    heads, width = _count(metadata, "heads"), _count(metadata, "embedding_length")
    if not heads or not width or not tokens:
        return UNKNOWN_SCRATCH
    inner = _count(metadata, "ffn_width") or 4 * width
    return tokens * _FLOAT * (2 * heads * sequence + inner + 4 * width)


def _count(metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key)
    return value if isinstance(value, int) and value > 0 else 0
