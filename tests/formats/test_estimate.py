"""The estimate's arithmetic on its own: monotonic, additive, and clear about what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pierhead.errors import CorruptData, UsageError
from pierhead.formats import gguf
from pierhead.formats.estimate import PROJECTOR_SCRATCH, estimate, fit_context

MODEL: dict[str, Any] = {
    "architecture": "llama",
    "weights_bytes": 1 << 30,
    "layers": 4,
    "heads": 8,
    "heads_kv": 2,
    "head_dim_k": 64,
    "head_dim_v": 64,
    "embedding_length": 512,
    "ffn_width": 2048,
    "vocab_size": 32000,
}


def test_the_cache_is_the_product_of_its_factors() -> None:
    assert estimate(MODEL, context=1024).kv_cache == 1024 * 4 * 2 * (64 + 64) * 2
    assert estimate(MODEL, context=1000).kv_cache == estimate(MODEL, context=1024).kv_cache
    assert estimate(MODEL, context=1024, parallel=3).kv_cache == 3 * estimate(MODEL, context=1024).kv_cache


@pytest.mark.parametrize(
    ("kind", "per_32"),
    [("f32", 128), ("f16", 64), ("bf16", 64), ("q8_0", 34), ("q5_1", 24), ("q5_0", 22), ("q4_1", 20), ("q4_0", 18)],
)
def test_every_cache_type_takes_its_block_size(kind: str, per_32: int) -> None:
    found = estimate(MODEL, context=256, cache_type_k=kind, cache_type_v=kind)
    assert found.kv_cache == 256 * 4 * 2 * 128 // 32 * per_32


def test_heads_per_layer_and_shared_and_windowed_layers_count_as_themselves() -> None:
    mixed = {**MODEL, "heads_kv": [2, 0, 1, 1]}
    assert estimate(mixed, context=256).kv_cache * 2 == estimate(MODEL, context=256).kv_cache
    shared = {**MODEL, "attention": {"shared_kv_layers": 3}}
    assert estimate(shared, context=256).kv_cache * 4 == estimate(MODEL, context=256).kv_cache
    windowed = {**MODEL, "sliding_window": 256, "attention": {"sliding_window_pattern": [1, 1, 1, 0]}}
    cells = 3 * 768 + 8192
    assert estimate(windowed, context=8192).kv_cache == cells * 2 * 128 * 2


def test_a_window_that_llama_cpp_ignores_changes_nothing() -> None:
    assert estimate({**MODEL, "architecture": "phi3", "sliding_window": 512}, context=8192).kv_cache == (
        estimate(MODEL, context=8192).kv_cache
    )


def test_an_embedding_model_has_no_cache() -> None:
    assert estimate({**MODEL, "architecture": "bert"}, context=512).kv_cache == 0


def test_adapters_and_projectors_are_added_and_the_parts_make_the_total() -> None:
    found = estimate(MODEL, context=512, extra_weights=5000)
    assert found.weights == MODEL["weights_bytes"] + 5000
    eye = 300 << 20
    seeing, plain = estimate(MODEL, context=512, projector=eye), estimate(MODEL, context=512)
    assert seeing.weights == plain.weights + eye
    assert seeing.compute == plain.compute + eye
    assert estimate(MODEL, context=512, projector=1).compute == plain.compute + PROJECTOR_SCRATCH
    told = json.loads(json.dumps(found.to_dict()))
    assert told["total"] == found.total == sum(told.values()) - told["total"]


@given(
    free=st.integers(0, 1 << 34),
    limit=st.integers(0, 1 << 18),
    parallel=st.integers(1, 8),
    kind=st.sampled_from(["f16", "q8_0"]),
)
@settings(max_examples=100, deadline=1000, suppress_health_check=list(HealthCheck))
def test_a_fitted_context_fits_and_the_next_one_does_not(free: int, limit: int, parallel: int, kind: str) -> None:
    options: dict[str, Any] = {"parallel": parallel, "cache_type_k": kind}
    context = fit_context(MODEL, free=free, limit=limit, **options)
    assert context == limit or context % 256 == 0
    assert context <= limit
    assert not context or estimate(MODEL, context=context, **options).total <= free
    if context < limit:
        assert estimate(MODEL, context=min(context // 256 * 256 + 256, limit), **options).total > free


def test_a_context_that_is_no_multiple_of_the_step_is_had_in_full() -> None:
    assert fit_context(MODEL, free=1 << 40, limit=300) == 300


@pytest.mark.parametrize(
    "options",
    [{"context": 0}, {"context": 256, "parallel": 0}, {"context": 256, "ubatch": -1}, {"context": 1, "batch": 0}],
)
def test_sizes_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        estimate(MODEL, **options)


def test_an_unknown_cache_type_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match="q9_9") as caught:
        estimate(MODEL, context=256, cache_type_v="q9_9")
    assert "q8_0" in (caught.value.hint or "")


@pytest.mark.parametrize("key", ["layers", "heads_kv", "weights_bytes", "attention", "state", "cache_layers"])
def test_a_damaged_stored_summary_is_named(key: str) -> None:
    with pytest.raises(CorruptData, match=key):
        estimate({**MODEL, key: "nonsense"}, context=256)


def test_one_part_of_a_split_model_counts_all_layers(
    tiny: Callable[..., bytes], written: Callable[[bytes], Path]
) -> None:
    found = gguf.summary(gguf.read_file(written(tiny({"split.count": 3, "split.no": 0, "llama.block_count": 9}))))
    whole = gguf.summary(gguf.read_file(written(tiny({"llama.block_count": 9}))))
    assert (found["split_count"], found["shards_read"]) == (3, 1)
    assert estimate(found, context=256).kv_cache == estimate(whole, context=256).kv_cache // 2 * 9


@pytest.mark.parametrize(
    ("state", "floats"),
    [
        ({"wkv_head_size": 64}, 2 * 512 + 512 * 64),
        ({"wkv_head_size": 64, "token_shift_count": 1}, 512 + 512 * 64),
        ({"shortconv_cache": 3}, 2 * 512),
        ({"kda_head_dim": 64, "conv_kernel": 4}, 3 * 3 * 64 * 8 + 64 * 64 * 8),
        ({"conv_kernel": 4, "inner_size": 1024, "state_size": 16}, 3 * (1024 + 0) + 16 * 1024),
        ({"conv_kernel": 4, "inner_size": 1024, "state_size": 128, "group_count": 2}, 3 * (1024 + 512) + 128 * 1024),
    ],
    ids=["rwkv7", "rwkv with one shift", "short convolution", "delta attention", "mamba", "mamba2"],
)
def test_recurrent_layers_keep_a_state_per_slot_that_no_context_changes(state: dict[str, int], floats: int) -> None:
    model = {**MODEL, "cache_layers": [0], "state": {"layers": [1, 2, 3], **state}}
    attention = estimate({**MODEL, "layers": 1}, context=1024, parallel=2).kv_cache
    assert estimate(model, context=1024, parallel=2).kv_cache == attention + 2 * 3 * 4 * floats


LAYOUT: dict[str, Any] = {
    "per_layer": [
        {"layers": [0, 1], "tensors": {"attn_q.weight": ["Q4_K", 512, 512], "attn_norm.weight": ["F32", 512]}},
        {"layers": [2, 3], "tensors": {"ffn_up.weight": ["Q6_K", 512, 2048], "ffn_gate.weight": ["Q4_K", 512, 2044]}},
    ],
    "other": {"token_embd.weight": ["Q4_K", 512, 32000]},
}


def test_weights_that_the_processor_wants_in_another_layout_count_twice() -> None:
    model = {**MODEL, **LAYOUT, "other": {**LAYOUT["other"], "output.weight": ["Q4_K", 512, 8]}}
    found = estimate(model, context=256, processor=frozenset({"avx2", "fma"}))
    assert found.repacked == (2 * 512 + 8) * 512 // 256 * 144  # not Q6_K, not rows that are no multiple of eight
    assert estimate(model, context=256, processor=frozenset({"sse4_2"})).repacked == 0
    assert found.total == estimate(model, context=256).total + found.repacked


def test_an_embedding_that_is_the_output_as_well_is_repacked_for_it() -> None:
    found = estimate({**MODEL, **LAYOUT}, context=256, processor=frozenset({"avx2"}))
    assert found.repacked == (2 * 512 + 32000) * 512 // 256 * 144


def test_checkpoints_hold_the_window_or_the_state_of_each_slot() -> None:
    windowed = {**MODEL, "sliding_window": 256, "attention": {"sliding_window_pattern": [1, 1, 1, 0]}}
    one = 256 * 3 * 2 * 128 * 2
    assert estimate(windowed, context=4096, parallel=2, checkpoints=4).checkpoints == 2 * 2 * one
    assert estimate(windowed, context=32768, checkpoints=4).checkpoints == 4 * one
    assert estimate(windowed, context=4096).checkpoints == estimate(MODEL, context=4096, checkpoints=4).checkpoints == 0
    state = {**MODEL, "cache_layers": [0], "state": {"layers": [1], "shortconv_cache": 3}}
    assert estimate(state, context=512, checkpoints=1).checkpoints == 4 * 2 * 512


def test_logits_of_every_token_cost_what_embeddings_of_a_generative_model_cost() -> None:
    more = estimate(MODEL, context=512, outputs=512).compute - estimate(MODEL, context=512).compute
    assert more >= 512 * 32000 * 4
