"""How much memory a model takes when ONNX Runtime serves it: weights, one batch's activations, the program; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Anonymous memory of the server with a model whose weights are next to nothing: Python, ONNX Runtime, the tokenizer.
PROGRAM = 48 << 20

# What a graph of which only the inputs are known needs to work. This margin is not measured.
UNKNOWN_SCRATCH = 128 << 20
SPREAD = 16  # times its inputs that such a graph takes, if that is more; not measured either

_FLOAT = 4  # bytes: activations of quantized models are float32, too
_INTEGERS = ("int8", "uint8", "int4", "uint4")
_QUANTIZED = 0.05  # of the weights: from there on the products of matrices are those of a quantized model


@dataclass(frozen=True)
class OnnxEstimate:
    """Bytes. ``compute`` is what is needed beside the weights: the scratch memory of the largest batch, which ONNX
    Runtime keeps for the next one, or what it needs while it loads, where that is more.
    """

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
    metadata: Mapping[str, Any],
    *,
    tokens: int,
    sequence: int,
    workers: int = 1,
    vocabulary: int = 0,
    file: str = "",
    fused: bool = True,
    inputs: int = 0,
) -> OnnxEstimate:
    """For batches of at most ``tokens`` tokens in texts of at most ``sequence``; ``workers`` batches run at a time.

    ``vocabulary`` is the size of the tokenizer's file in bytes, which takes several times as much once it is read.
    ``file`` is the graph that runs, where there are several. ``fused``: ONNX Runtime joins operators into larger ones.
    ``inputs`` are the bytes of a batch of tensors, where it is no text.
    """
    graphs: Mapping[str, Mapping[str, Any]] = metadata.get("graphs") or {}
    graph: dict[str, Any] = {**metadata, **graphs.get(file, {})}
    weights = _count(graph, "weights_bytes")
    compute = max(
        workers * _compute(graph, tokens, sequence, fused, inputs), weights // 3
    )  # loading copies some of them
    return OnnxEstimate(weights, compute, PROGRAM + 8 * vocabulary)


def _compute(graph: Mapping[str, Any], tokens: int, sequence: int, fused: bool, inputs: int) -> int:
    """For each token the larger of two moments: attention, with scores for every pair of tokens in a text three times
    over, and the wide layers after it. How many rows that makes is measured (``bench/estimates.py``).
    """
    heads, width = _count(graph, "heads"), _count(graph, "embedding_length")
    if not heads or not width or not tokens:
        return max(UNKNOWN_SCRATCH, SPREAD * inputs)
    inner = _count(graph, "ffn_width") or 4 * width
    row = max(3 * heads * sequence + 7 * width, 3 * inner + 11 * width)
    if is_quantized(graph):  # the integers that go in, and those that come out before they are floats again
        row += 5 * inner // 4 if fused else 5 * inner
    return tokens * _FLOAT * row


def is_quantized(graph: Mapping[str, Any]) -> bool:
    """Whether a part of the weights that counts is integers."""
    types: Mapping[str, Any] = graph.get("dtypes") or {}
    sizes = {name: size for name, size in types.items() if isinstance(size, int)}
    return sum(sizes.get(name, 0) for name in _INTEGERS) > _QUANTIZED * sum(sizes.values())


def _count(metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key)
    return value if isinstance(value, int) and value > 0 else 0
