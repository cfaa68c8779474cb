"""How much memory a model in OpenVINO's format takes when OpenVINO GenAI writes with it; pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pierhead.formats.estimate import Estimate
from pierhead.formats.shape import Facts

BLOCK = 32  # tokens that the pipeline keeps together on a CPU
BATCH = 512  # tokens that it works on at once

# Bytes of a cached number; the small ones have a scale and a zero beside every group.
PRECISIONS = {"u8": 1.19, "u4": 0.69, "f16": 2.0, "bf16": 2.0, "f32": 4.0}

# Memory of OpenVINO GenAI 2026.4 with SmolLM2-135M less its weights, mapped and repacked, and its cache.
PROGRAM = 230 << 20


def blocks(context: int, parallel: int) -> int:
    """How many blocks hold all requests at once."""
    return (-(-context // BLOCK) + 1) * parallel


def estimate(
    summary: Mapping[str, Any], *, context: int, parallel: int = 1, precision: str = "u8", batch: int = BATCH
) -> Estimate:
    """Memory for ``parallel`` requests of ``context`` tokens each; weights count twice, since they are repacked."""
    facts = Facts(summary)
    weights = facts.number("weights_bytes")
    per_token = facts.number("layers") * facts.number("heads_kv")
    per_token *= facts.number("head_dim_k") + facts.number("head_dim_v")
    cache = int(blocks(context, parallel) * BLOCK * per_token * PRECISIONS[precision])
    width = facts.number("embedding_length") * 4 + facts.number("ffn_width") * 3
    compute = 4 * batch * width + 4 * 2 * parallel * facts.number("vocab_size")
    return Estimate(weights * 2, cache, compute, PROGRAM)


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


def estimate_reading(summary: Mapping[str, Any], *, tokens: int, text: int) -> Estimate:
    """Memory for batches of at most ``tokens`` tokens in texts of at most ``text``, which is no more than they are."""
    facts = Facts(summary)
    width, heads = facts.number("embedding_length"), facts.number("heads")
    inner = facts.number("ffn_width") or 4 * width
    compute = 4 * tokens * (heads * min(text, tokens) + 2 * inner + 8 * width)
    return Estimate(facts.number("weights_bytes") * 2, 0, compute, PROGRAM)
