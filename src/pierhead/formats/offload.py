"""How a GGUF model's memory parts between a GPU and the machine when llama.cpp puts layers on the GPU; pure arithmetic.

Layers are counted as llama.cpp's ``n_gpu_layers`` does: the output is one, and the last of the model go first. Source:
``llama_model_base::load_tensors``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from pierhead.formats.estimate import (
    CELL_STEP,
    PROJECTOR_SCRATCH,
    Estimate,
    Start,
    caches,
    estimate,
    graph,
    inputs,
    logits,
)
from pierhead.formats.ggml import TENSOR_TYPES
from pierhead.formats.repack import size_of
from pierhead.formats.shape import CACHELESS, Facts, Shape

# What a process has on a GPU before any model: CUDA's context and its kernels, as read on an H200: 604 MiB beside the
# buffers that llama.cpp tells of (tests/gpu/test_llamacpp.py prints it).
CONTEXT = 600 << 20
# What CUDA's libraries take of the machine's own memory, with the pages of their files that are read.
LIBRARIES = 448 << 20
# Several GPUs work on several ubatches at once: each has its inputs this often.
PIPELINE = 4

_KINDS = {kind.name for kind in TENSOR_TYPES.values()}
_INPUT = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")  # looked up by the processor


@dataclass(frozen=True)
class Offload:
    """``layers`` of ``of`` on GPUs: what is needed on each of ``gpus`` of them, and of the machine's own memory."""

    layers: int
    of: int
    gpus: int
    gpu: Estimate
    host: Estimate


class _Weights(NamedTuple):
    """Bytes of each layer, of the output, and of the largest matrix of a layer.

    ``twice`` is an embedding that is the output's matrix as well: it stays, and is on the GPU a second time.
    """

    layers: list[int]
    output: int
    twice: int
    matrix: int


def offload(
    summary: Mapping[str, Any],
    *,
    layers: int,
    gpus: int = 1,
    context: int,
    extra_weights: int = 0,
    projector: int = 0,
    reserved: int = 0,
    cache: bool = True,
    **options: Any,
) -> Offload:
    """The parts for ``layers`` on ``gpus`` GPUs of equal share; ``options`` are those of ``estimate``.

    ``extra_weights`` and ``projector`` are on a GPU. ``reserved`` are tokens for whose logits a GPU keeps room: it is
    taken there at the start, in the machine's own memory when it is used. ``cache``: whether a layer's cache goes where
    the layer is.
    """
    plan = _start(context, options)
    shape, weights = Shape.of(summary), _weights(summary)
    count = len(weights.layers)
    layers = max(0, min(layers, count + 1))
    first = count + 1 - layers  # of the model's own that are on a GPU
    held = [*weights.layers[first:], weights.output + weights.twice] if layers else []
    stored = [*_cached(summary, shape, plan)[first:], 0] if cache and layers else [0] * len(held)
    fullest = _fullest(held, stored, gpus)
    wide = _start(context, {**options, "outputs": max(reserved, plan.outputs)})
    copied = 2 * weights.matrix if layers <= count else 0  # of a layer that stays, while a long prompt is read
    seeing = max(projector, PROJECTOR_SCRATCH) if projector else 0
    gpu = Estimate(
        weights=sum(held[fullest]) + extra_weights + projector,
        kv_cache=sum(stored[fullest]),
        compute=graph(shape, wide) + inputs(shape, plan) * (PIPELINE if gpus > 1 else 1) + copied + seeing,
        # the logits of a whole text pass through a second buffer, and in half precision through one more
        overhead=CONTEXT + _scratch(shape, plan) + logits(shape, wide) * (3 if _half(summary) else 2) // 2,
    )
    whole = estimate(summary, context=context, **_without(options))
    host = Estimate(
        weights=whole.weights - sum(held) + (weights.twice if layers else 0),
        kv_cache=whole.kv_cache - sum(stored),
        compute=_host_compute(shape, plan, full=layers > count),
        overhead=whole.overhead + LIBRARIES,
        checkpoints=whole.checkpoints,
    )
    return Offload(layers, count + 1, gpus, gpu, host)


def fit_layers(summary: Mapping[str, Any], *, free: int, least: int = 1, **options: Any) -> Offload | None:
    """The most layers that fit in ``free`` bytes of each GPU; None where not even ``least`` do."""
    low, high = least - 1, Facts(summary).number("layers") + 1
    while low < high:
        middle = (low + high + 1) // 2
        if offload(summary, layers=middle, **options).gpu.total <= free:
            low = middle
        else:
            high = middle - 1
    return offload(summary, layers=low, **options) if low >= least else None


def fit_full(summary: Mapping[str, Any], *, free: int, limit: int, memory: int = 0, **options: Any) -> int:
    """The largest context with which all fits: in ``free`` bytes of the GPU and ``memory`` here (0: any). Else 0."""
    layers = Facts(summary).number("layers") + 1
    low, high = 0, -(-max(limit, 0) // CELL_STEP)
    while low < high:
        middle = (low + high + 1) // 2
        found = offload(summary, layers=layers, context=middle * CELL_STEP, **options)
        if found.gpu.total <= free and (not memory or found.host.total <= memory):
            low = middle
        else:
            high = middle - 1
    return min(low * CELL_STEP, limit)


def _start(context: int, options: Mapping[str, Any]) -> Start:
    known = ("cache_type_k", "cache_type_v", "parallel", "batch", "ubatch", "flash_attention", "outputs")
    return Start.of(context=context, **{name: options[name] for name in known if name in options})


def _without(options: Mapping[str, Any]) -> dict[str, Any]:
    """With a GPU at hand no weights are laid out anew for the processor."""
    return {name: value for name, value in options.items() if name != "processor"}


def _fullest(weights: Sequence[int], caches: Sequence[int], gpus: int) -> slice:
    """Which layers the GPU has that has the most: they follow one another, and no layer is divided."""
    ends = [-(-len(weights) * gpu // gpus) for gpu in range(gpus + 1)]
    parts = [slice(start, end) for start, end in itertools.pairwise(ends)]
    return max(parts, key=lambda part: sum(weights[part]) + sum(caches[part]))


def _cached(summary: Mapping[str, Any], shape: Shape, plan: Start) -> list[int]:
    """Bytes of cache and of recurrent state, by layer."""
    found = caches(shape, plan) or [0] * Facts(summary).number("layers")
    listed = Facts(summary).inner("state").listed("layers") or []
    for index in listed:
        if index < len(found):
            found[index] += shape.state // len(listed) * plan.parallel
    return found


def _scratch(shape: Shape, plan: Start) -> int:
    """What kernels take for numbers in another type than they are given.

    For the widest of a layer's steps, and for the cache of one layer, which attention over a prompt wants as f16.
    """
    widest = max(shape.ffn, shape.expert * shape.experts_used, shape.embedding, shape.inner)
    converted = [
        (plan.window(shape) if layer.windowed else plan.cells)
        * ((layer.k if plan.type_k.name != "F16" else 0) + (layer.v if plan.type_v.name != "F16" else 0))
        for layer in shape.layers
    ]
    return 8 * plan.ubatch * widest + (2 * plan.parallel * max(converted, default=0) if plan.flash else 0)


def _half(summary: Mapping[str, Any]) -> bool:
    """Whether the output's weights are in half precision: then logits are worked out in that first."""
    other = cast("Mapping[str, Sequence[Any]]", summary.get("other") or {})
    output = other.get("output.weight") or other.get("token_embd.weight") or ("",)
    return output[0] in ("F16", "BF16")


def _host_compute(shape: Shape, plan: Start, *, full: bool) -> int:
    """The processor looks up words and takes the logits; the layers that stay need as much as all would."""
    rows = inputs(shape, plan) + 4 * shape.embedding * plan.ubatch
    return logits(shape, plan) + rows + (0 if full else graph(shape, plan))


def _weights(summary: Mapping[str, Any]) -> _Weights:
    """From the summary's tensors; what it does not list counts as part of the output, which goes to the GPU first."""
    facts = Facts(summary)
    layers = [0] * facts.number("layers")
    matrix = 0
    for row in cast("list[Mapping[str, Any]]", summary.get("per_layer") or []):
        for index in Facts(row).listed("layers") or []:
            if index < len(layers):
                layers[index] = Facts(row).number("bytes")
        tensors = cast("Mapping[str, Sequence[Any]]", row.get("tensors") or {})
        matrix = max([matrix, *map(_bytes, tensors.values())] if tensors else [matrix, Facts(row).number("bytes")])
    other = cast("Mapping[str, Sequence[Any]]", summary.get("other") or {})
    kept = sum(_bytes(shape) for name, shape in other.items() if name.startswith(_INPUT))
    tied = summary.get("architecture") not in CACHELESS and not any(name.startswith("output.") for name in other)
    twice = _bytes(other["token_embd.weight"]) if tied and "token_embd.weight" in other else 0
    rest = facts.number("weights_bytes") - sum(layers) - kept
    if rest < 0 or not sum(layers):  # a summary without tensors: all layers are alike
        share = facts.number("weights_bytes") // (len(layers) + 1)
        return _Weights([share] * len(layers), facts.number("weights_bytes") - share * len(layers), 0, share)
    return _Weights(layers, rest, twice, matrix)


def _bytes(shape: Sequence[Any]) -> int:
    return size_of(shape) if len(shape) > 1 and shape[0] in _KINDS else 0
