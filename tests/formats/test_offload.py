"""What of a model's memory is on the GPU for each number of layers: nothing is lost, nothing is counted twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pierhead.errors import CorruptData
from pierhead.formats import gguf
from pierhead.formats.estimate import estimate
from pierhead.formats.offload import CONTEXT, LIBRARIES, fit_full, fit_layers, offload

from . import architectures

EMBEDDING = 512 * 32000 // 256 * 144
LAYER = 512 * 2048 // 256 * 210
OUTPUT = 512 * 32000 // 256 * 210
MODEL: dict[str, Any] = {
    "format": "gguf",
    "architecture": "llama",
    "weights_bytes": EMBEDDING + 4 * LAYER + OUTPUT + 4 * 512,
    "layers": 4,
    "heads": 8,
    "heads_kv": 2,
    "head_dim_k": 64,
    "head_dim_v": 64,
    "embedding_length": 512,
    "ffn_width": 2048,
    "vocab_size": 32000,
    "per_layer": [{"layers": [0, 1, 2, 3], "bytes": LAYER, "tensors": {"ffn_up.weight": ["Q6_K", 512, 2048]}}],
    "other": {
        "token_embd.weight": ["Q4_K", 512, 32000],
        "output.weight": ["Q6_K", 512, 32000],
        "output_norm.weight": ["F32", 512],
    },
}
TIED: dict[str, Any] = {
    **MODEL,
    "weights_bytes": MODEL["weights_bytes"] - OUTPUT,
    "other": {name: shape for name, shape in MODEL["other"].items() if name != "output.weight"},
}


def test_the_output_goes_first_and_the_last_layers_follow_it() -> None:
    found = [offload(MODEL, layers=n, context=1024).gpu for n in range(6)]
    assert [one.weights for one in found] == [0, *(OUTPUT + 4 * 512 + n * LAYER for n in range(5))]
    cell = 1024 * 2 * 128 * 2
    assert [one.kv_cache for one in found] == [0, *(n * cell for n in range(5))]


@pytest.mark.parametrize("layers", range(7))
@pytest.mark.parametrize("model", [MODEL, TIED], ids=["its own output", "an embedding that is the output"])
def test_both_sides_together_are_the_whole_model(model: dict[str, Any], layers: int) -> None:
    found, whole = offload(model, layers=layers, context=2048, parallel=2), estimate(model, context=2048, parallel=2)
    twice = EMBEDDING if model is TIED and layers else 0
    assert found.gpu.weights + found.host.weights == whole.weights + twice
    assert found.gpu.kv_cache + found.host.kv_cache == whole.kv_cache
    assert (found.layers, found.of) == (min(layers, 5), 5)


def test_with_every_layer_on_the_gpu_only_the_embedding_stays() -> None:
    full = offload(MODEL, layers=99, context=1024)
    assert full.host.weights == EMBEDDING
    assert full.host.kv_cache == 0
    assert full.host.total < estimate(MODEL, context=1024).total + LIBRARIES
    assert full.gpu.overhead > CONTEXT


@pytest.mark.parametrize("name", architectures.MODELS)
def test_every_architecture_parts_without_a_rest(name: str, tmp_path: Path) -> None:
    found = gguf.summary(gguf.read_file(architectures.write(tmp_path / "m.gguf", architectures.MODELS[name]())))
    options: dict[str, Any] = {"context": 4096, "parallel": 2}
    whole = estimate(found, **options)
    twice = offload(found, layers=1, **options)
    more = twice.gpu.weights + twice.host.weights - whole.weights
    for layers in range(1, found["layers"] + 2):
        got = offload(found, layers=layers, **options)
        assert got.gpu.weights + got.host.weights == whole.weights + more
        assert got.gpu.kv_cache + got.host.kv_cache == whole.kv_cache
        assert min(got.gpu.weights, got.host.weights, got.gpu.kv_cache, got.host.kv_cache) >= 0
    assert offload(found, layers=999, **options).host.weights < whole.weights / 2


@given(free=st.integers(0, 2 << 30), gpus=st.integers(1, 4), context=st.integers(256, 1 << 16))
@settings(max_examples=100, deadline=2000)
def test_the_layers_that_fit_do_and_one_more_does_not(free: int, gpus: int, context: int) -> None:
    options: dict[str, Any] = {"gpus": gpus, "context": context}
    found = fit_layers(MODEL, free=free, **options)
    assert found is None or found.gpu.total <= free
    layers = found.layers if found else 0
    # what stays costs room for its copies: the last step, to all of them, may cost less than the one before
    assert layers >= 4 or offload(MODEL, layers=layers + 1, **options).gpu.total > free


def test_a_context_with_every_layer_on_the_gpu_fits_both_sides() -> None:
    need = offload(MODEL, layers=5, context=4096)
    assert fit_full(MODEL, free=need.gpu.total, limit=8192) == 4096
    assert fit_full(MODEL, free=need.gpu.total * 9, limit=8192) == 8192
    assert fit_full(MODEL, free=need.gpu.total * 9, limit=8192, memory=1 << 20) == 0
    assert fit_full(MODEL, free=CONTEXT, limit=8192) == 0


def test_of_several_gpus_the_fullest_counts() -> None:
    one, two, five = (offload(MODEL, layers=5, context=4096, gpus=n).gpu for n in (1, 2, 5))
    assert two.weights == one.weights - 3 * LAYER  # the output is the largest part, and a layer is beside it
    assert two.kv_cache * 4 == one.kv_cache
    assert (five.weights, five.kv_cache) == (OUTPUT + 4 * 512, 0)
    assert two.overhead == one.overhead  # each has a context of its own


def test_what_comes_beside_and_the_logits_of_embeddings_are_on_the_gpu() -> None:
    plain = offload(MODEL, layers=5, context=1024)
    beside = offload(MODEL, layers=5, context=1024, extra_weights=5000, projector=1 << 20)
    assert beside.gpu.weights - plain.gpu.weights == 5000 + (1 << 20)
    assert beside.gpu.compute > plain.gpu.compute
    assert beside.host == plain.host
    wide = offload(MODEL, layers=5, context=1024, reserved=512)
    assert wide.gpu.compute - plain.gpu.compute > 0.9 * 4 * 512 * 32000 - plain.gpu.compute
    assert wide.host == plain.host
    assert offload(MODEL, layers=5, context=1024, cache=False).gpu.kv_cache == 0


def test_a_small_cache_is_made_large_for_one_layer_at_a_time() -> None:
    full = offload(MODEL, layers=5, context=8192, parallel=2).gpu
    small = offload(MODEL, layers=5, context=8192, parallel=2, cache_type_k="q8_0", cache_type_v="q8_0").gpu
    assert small.overhead - full.overhead == 8192 * 2 * 2 * (64 + 64) * 2
    assert small.total < full.total


def test_a_summary_without_tensors_parts_evenly() -> None:
    bare = {name: value for name, value in MODEL.items() if name not in ("per_layer", "other")}
    found = offload(bare, layers=3, context=512)
    assert found.gpu.weights + found.host.weights == MODEL["weights_bytes"]
    assert found.gpu.weights == pytest.approx(MODEL["weights_bytes"] * 3 / 5, rel=0.01)


@pytest.mark.parametrize("row", [{"layers": "x", "bytes": 1}, {"layers": [0], "bytes": "x"}])
def test_a_damaged_summary_is_named(row: dict[str, Any]) -> None:
    with pytest.raises(CorruptData):
        offload({**MODEL, "per_layer": [row]}, layers=2, context=512)
