"""How much of a GPU's memory a safetensors model takes when vLLM or a server like it runs it there; pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from pierhead.formats.estimate import Estimate
from pierhead.formats.safetensors_estimate import cache_size, weights
from pierhead.formats.shape import Facts, Shape

# What the server takes beside weights, cache and work: CUDA's context, the libraries' workspaces and the recorded
# graphs of a step. Set so that no reading on an H200 was above the claim (by 4 to 10 %).
PROGRAM = 704 << 20
# Buffers in which several GPUs exchange what each has worked out. Not measured.
EXCHANGE = 512 << 20
# What an encoder of pictures needs to look at one depends on the picture. This margin is not measured.
PICTURE = 1024 << 20
SORTED = 32  # bytes for each token of the vocabulary while the likeliest ones of a request are sought


class Split(NamedTuple):
    """Over how many GPUs each layer (``tensor``) and the layers (``pipeline``) are spread."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return max(1, self.tensor) * max(1, self.pipeline)


WHOLE = Split()


def estimate(
    summary: Mapping[str, Any],
    *,
    cached: int,
    parallel: int,
    batch: int,
    cache_bytes: float = 2.0,
    full: bool = False,
    extra_weights: int = 0,
    sees: bool = False,
    split: Split = WHOLE,
) -> Estimate:
    """Memory of each GPU, with a cache of ``cached`` tokens and ``batch`` tokens worked on in one step.

    ``full`` says that weights in F32 stay so and that the work is done in 32 bits; ``sees``: it takes pictures.
    """
    shape = Shape.of(summary)
    return Estimate(
        weights=-(-(weights(summary, full) + extra_weights) // split.gpus),
        kv_cache=cache(summary, cached=cached, parallel=parallel, cache_bytes=cache_bytes, split=split),
        compute=_compute(shape, batch, parallel, 4 if full else 2) + (PICTURE if sees else 0),
        overhead=PROGRAM + (EXCHANGE if split.gpus > 1 else 0),
    )


def cache(
    summary: Mapping[str, Any], *, cached: int, parallel: int, cache_bytes: float = 2.0, split: Split = WHOLE
) -> int:
    """Bytes of each GPU's cache for ``cached`` tokens, and for ``parallel`` states where it keeps some."""
    size = cache_size(summary, context=cached, cache_bytes=cache_bytes) + Shape.of(summary).state * parallel
    attention = cast("dict[str, Any]", summary.get("attention") or {})
    heads = Facts(summary).most("heads_kv")
    tensor = 1 if attention.get("kv_lora_rank") else max(1, min(split.tensor, heads or 1))  # others keep a copy
    return -(-size // (tensor * max(1, split.pipeline)))


def _compute(shape: Shape, batch: int, parallel: int, size: int) -> int:
    """What lives at once for one step at the widest point of a layer, and choosing the next token of all requests."""
    width = max(3 * shape.ffn, 3 * shape.experts_used * shape.expert, 2 * shape.heads * shape.head_dim_k)
    return size * batch * (4 * shape.embedding + width) + SORTED * parallel * shape.vocabulary
