"""How much memory a model takes when llama.cpp serves it: weights, KV cache and compute buffers; pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pierhead.errors import UsageError
from pierhead.formats.ggml import CACHE_TYPES, TensorType, row_bytes
from pierhead.formats.repack import repacked
from pierhead.formats.shape import Facts, Shape

CELL_STEP = 256
"""llama.cpp rounds the cells of a cache up to multiples of this."""

CHECKPOINT_STEP = 8192
"""Tokens that lie between the checkpoints that its server keeps of one prompt; two more are kept at its end."""

# Anonymous memory of a started engine less its buffers was 25 MiB and 160 bytes per token of the vocabulary.
PROGRAM = 32 << 20
PER_TOKEN_OF_VOCABULARY = 192

# What a projector allocates to look at a picture depends on the picture. This margin is not measured: its own size,
# and no less than this.
PROJECTOR_SCRATCH = 128 << 20

# What other formats need to work depends on inputs that nobody knows yet. This margin is not measured either.
OTHER_SCRATCH = 128 << 20


@dataclass(frozen=True)
class Estimate:
    """Bytes. ``weights`` are memory-mapped: pages that the kernel can drop and that replicas of one file share.

    ``kv_cache`` includes recurrent state. ``compute`` is the graph's scratch memory for one ``ubatch`` and the
    logits. ``overhead`` is the engine program itself with its vocabulary. ``repacked`` are weights that the processor's
    code keeps a second time in a layout of its own, ``checkpoints`` the states of a prompt that the server keeps to go
    back to, for models with windows or recurrent state. Whole prompts that it keeps beyond its slots (llama.cpp's
    ``cache_ram_mib``) are not included.
    """

    weights: int
    kv_cache: int
    compute: int
    overhead: int
    repacked: int = 0
    checkpoints: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.compute + self.overhead + self.repacked + self.checkpoints

    def to_dict(self) -> dict[str, int]:
        """JSON-safe form: the parts and their ``total``."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Start:
    """The parameters of one start, checked."""

    cells: int  # of each slot
    type_k: TensorType
    type_v: TensorType
    parallel: int
    ubatch: int
    flash: bool
    outputs: int  # tokens whose logits are worked out at once

    @classmethod
    def of(
        cls,
        *,
        context: int,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        parallel: int = 1,
        batch: int = 2048,
        ubatch: int = 512,
        flash_attention: bool = True,
        outputs: int = 0,
    ) -> Start:
        """See ``estimate``."""
        if min(context, parallel, batch, ubatch) < 1:
            raise UsageError(
                "context, parallel, batch and ubatch must be at least 1", hint="`pier inspect --help` explains them."
            )
        cells = _pad(context, CELL_STEP)
        return cls(
            cells=cells,
            type_k=_cache_type(cache_type_k),
            type_v=_cache_type(cache_type_v),
            parallel=parallel,
            ubatch=min(ubatch, batch, cells * parallel),
            flash=flash_attention,
            outputs=outputs or parallel,
        )

    def window(self, shape: Shape) -> int:
        """Cells of a windowed layer."""
        return min(self.cells, _pad(shape.window + self.ubatch, CELL_STEP))


def estimate(
    summary: Mapping[str, Any],
    *,
    context: int,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    parallel: int = 1,
    batch: int = 2048,
    ubatch: int = 512,
    extra_weights: int = 0,
    projector: int = 0,
    flash_attention: bool = True,
    outputs: int = 0,
    checkpoints: int = 0,
    processor: frozenset[str] = frozenset(),
) -> Estimate:
    """Memory for ``parallel`` slots of ``context`` tokens each; ``extra_weights``: bytes of adapters and draft model.

    ``projector`` are the bytes of a multimodal projector: they count as weights, and a margin for its work as compute.
    ``summary`` is what ``summarize`` made; a model without known layers (most in ONNX) needs its weights and a margin.
    Cache types are llama.cpp's names (f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl); any other is a
    ``UsageError``. Without flash attention the whole matrix of attention scores of a ubatch is materialized.
    ``outputs``: tokens whose logits are worked out at once (0: the last one of each slot; a generative model that is
    asked for embeddings works out those of every token). ``checkpoints``: how many its server may keep of each slot.
    ``processor``: the features of the processor that multiplies the weights; empty where a GPU does.
    """
    if extra_weights < 0 or projector < 0:
        raise UsageError("sizes must not be negative", hint="`pier inspect --help` explains them.")
    plan = Start.of(
        context=context,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        parallel=parallel,
        batch=batch,
        ubatch=ubatch,
        flash_attention=flash_attention,
        outputs=outputs,
    )
    shape = Shape.of(summary)
    weights = Facts(summary).number("weights_bytes")
    if not shape.layers and summary.get("format", "gguf") not in ("gguf", "safetensors"):
        return Estimate(weights + extra_weights + projector, 0, max(weights // 4, OTHER_SCRATCH), PROGRAM)
    return Estimate(
        weights=weights + extra_weights + projector,
        kv_cache=_cache(shape, plan) + shape.state * plan.parallel,
        compute=_compute(shape, plan) + (max(projector, PROJECTOR_SCRATCH) if projector else 0),
        overhead=PROGRAM + PER_TOKEN_OF_VOCABULARY * shape.vocabulary,
        repacked=repacked(summary, processor) if processor else 0,
        checkpoints=_checkpoints(shape, plan, checkpoints),
    )


def fit_context(summary: Mapping[str, Any], *, free: int, limit: int, **options: Any) -> int:
    """The largest context per slot whose estimate fits in ``free`` bytes: ``limit``, a multiple of 256 below it, or 0.

    ``options`` are those of ``estimate`` but ``context``.
    """
    low, high = 0, -(-max(limit, 0) // CELL_STEP)
    while low < high:
        middle = (low + high + 1) // 2
        if estimate(summary, context=middle * CELL_STEP, **options).total <= free:
            low = middle
        else:
            high = middle - 1
    return min(low * CELL_STEP, limit)


def _cache_type(name: str) -> TensorType:
    kind = CACHE_TYPES.get(name.lower())
    if kind is None:
        raise UsageError(f"unknown cache type {name!r}", hint=f"Choose one of {', '.join(sorted(CACHE_TYPES))}.")
    return kind


def _pad(value: int, step: int) -> int:
    return -(-value // step) * step


def _cache(shape: Shape, plan: Start) -> int:
    """KV cells of all layers and slots."""
    return sum(caches(shape, plan))


def caches(shape: Shape, plan: Start) -> list[int]:
    """Bytes of each layer's cells for all slots; windowed layers have fewer (llama_kv_cache_iswa)."""
    windowed = plan.window(shape)
    return [
        (windowed if layer.windowed else plan.cells)
        * (row_bytes(plan.type_k, layer.k) + row_bytes(plan.type_v, layer.v))
        * plan.parallel
        for layer in shape.layers
    ]


def _checkpoints(shape: Shape, plan: Start, most: int) -> int:
    """What the server keeps to go back to in a prompt: the cells of windows that are in sight, and recurrent state."""
    cells = min(shape.window, plan.cells)
    one = shape.state + sum(
        cells * (row_bytes(plan.type_k, layer.k) + row_bytes(plan.type_v, layer.v))
        for layer in shape.layers
        if layer.windowed
    )
    return min(most, 2 + plan.cells // CHECKPOINT_STEP) * one * plan.parallel


def _compute(shape: Shape, plan: Start) -> int:
    """Scratch memory of the graph for one ubatch, and the logits that are handed out.

    Fitted to what llama.cpp allocates; ``bench/estimate.py`` and the tests compare.
    """
    return graph(shape, plan) + inputs(shape, plan) + logits(shape, plan)


def inputs(shape: Shape, plan: Start) -> int:
    """What is put into the graph for one ubatch, mostly the masks of attention."""
    mask = 2 if plan.flash else 4  # bytes
    return sum(
        mask * plan.ubatch * (plan.window(shape) if windowed else plan.cells) + _rotation(shape, plan)
        for windowed in {layer.windowed for layer in shape.layers if layer.k}
    )


def graph(shape: Shape, plan: Start) -> int:
    """What the graph needs beside its inputs; the logits are worked out in it."""
    states = plan.parallel * shape.state // max(shape.state_layers, 1)
    return max(_per_token(shape, plan) * plan.ubatch + states, logits(shape, plan))


def logits(shape: Shape, plan: Start) -> int:
    """The logits of one ubatch."""
    return 4 * shape.vocabulary * plan.outputs


def _rotation(shape: Shape, plan: Start) -> int:
    """Quantized caches hold rotated vectors; the rotation matrices are inputs of the graph."""
    side = shape.head_dim_k & -shape.head_dim_k  # the largest power of two that divides it
    return (4 * side * side if plan.type_k.block > 1 else 0) + (4 * 64 * 64 if plan.type_v.block > 1 else 0)


def _per_token(shape: Shape, plan: Start) -> int:
    """Bytes that live at once for each token of a ubatch, at the widest point of a layer (all in f32)."""
    width, experts = shape.embedding, shape.experts_used
    scores = 0 if plan.flash else shape.heads * plan.cells
    steps = (
        5 * width + 3 * shape.ffn,  # gate, up and their product
        5 * width + shape.heads * (shape.head_dim_k + shape.head_dim_v) + scores,
        5 * width + 3 * experts * shape.expert,
        3 * width + experts * (shape.expert + 2 * width) if shape.expert else 0,  # every expert's answer, weighted
        5 * width + 5 * shape.inner,
    )
    return 4 * max(steps) + 32
