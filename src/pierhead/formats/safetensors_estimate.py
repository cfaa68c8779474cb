"""How much memory a safetensors model takes when vLLM or a server like it runs it on a CPU; pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pierhead.formats.estimate import Estimate
from pierhead.formats.shape import Facts, Shape

BLOCK = 128  # tokens that vLLM keeps together on a CPU
BATCH = 2048  # tokens that it works on at once

# Anonymous memory of vLLM 0.32 with SmolLM2-135M less its weights and cache: the server, its engine, PyTorch's own.
PROGRAM = 1650 << 20
_HALVED = ("F32",)  # kept in half of that, where nobody asks for another type


def estimate(
    summary: Mapping[str, Any],
    *,
    context: int,
    parallel: int = 1,
    cache_bytes: float = 2.0,
    full: bool = False,
    extra_weights: int = 0,
    program: int = PROGRAM,
) -> Estimate:
    """Memory for ``parallel`` requests of ``context`` tokens each, all of which the cache holds at once.

    ``cache_bytes`` is the size of a cached number; ``full`` says that weights in F32 stay so.
    """
    shape = Shape.of(summary)
    return Estimate(
        weights=weights(summary, full) + extra_weights,
        kv_cache=cache_size(summary, context=context, parallel=parallel, cache_bytes=cache_bytes),
        compute=_compute(shape, min(BATCH, context * parallel), parallel),
        overhead=program,
    )


def cache_size(summary: Mapping[str, Any], *, context: int, parallel: int = 1, cache_bytes: float = 2.0) -> int:
    """Bytes of the blocks for all of it and the one that vLLM keeps empty; 0 for a model that caches nothing."""
    attention = cast("dict[str, Any]", summary.get("attention") or {})
    latent = bool(attention.get("kv_lora_rank"))
    per_token = sum(layer.k + (0 if latent else layer.v) for layer in Shape.of(summary).layers)
    blocks = -(-context // BLOCK) * parallel + 1
    return int(blocks * BLOCK * per_token * cache_bytes)


def fit_context(summary: Mapping[str, Any], *, free: int, limit: int, **options: Any) -> int:
    """The most tokens per request, at most ``limit`` and a multiple of a block, that fit in ``free`` bytes; else 0."""
    low, high = 0, max(limit, 0) // BLOCK
    while low < high:
        middle = (low + high + 1) // 2
        if estimate(summary, context=middle * BLOCK, **options).total <= free:
            low = middle
        else:
            high = middle - 1
    return low * BLOCK


def weights(summary: Mapping[str, Any], full: bool) -> int:
    """Bytes of all weights in the type in which they are used; ``full`` says that F32 stays F32."""
    size = Facts(summary).number("weights_bytes")
    given: Any = summary.get("dtypes")
    if full or not isinstance(given, Mapping):
        return size
    share = Facts(cast("Mapping[str, Any]", given))
    return size - sum(share.number(word) // 2 for word in _HALVED)


def _compute(shape: Shape, tokens: int, parallel: int) -> int:
    """What lives at once for the tokens of one step at the widest point of a layer, and the logits of all requests."""
    width = max(3 * shape.ffn, 3 * shape.experts_used * shape.expert, 2 * shape.heads * shape.head_dim_k)
    return 4 * tokens * (4 * shape.embedding + width) + 3 * 4 * parallel * shape.vocabulary
