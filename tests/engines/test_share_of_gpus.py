"""SGLang, TensorRT-LLM and Triton on GPUs: what each claims, and what keeps it to that; none of them was ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.conformance.test_engine import Sample
from tests.engines.test_vllm_cuda import LLAMA, PER_TOKEN, gpu

from pierhead.engines.base import Engine, Plan, PlanRequest
from pierhead.engines.gpus import Device
from pierhead.engines.sglang import SgLang
from pierhead.engines.tensorrtllm import TensorRtLlm
from pierhead.engines.triton import Triton
from pierhead.errors import OutOfMemory, UsageError

SAMPLES = Path(__file__).parent.parent / "conformance" / "engines"
GIB = 1 << 30
FIRST = "nvidia.com/gpu=0"


def plan(engine: Engine, devices: tuple[Device, ...], /, metadata: dict[str, Any] | None = None, **wishes: Any) -> Plan:
    sample = "triton" if engine.name == "triton" else "vllm"  # a folder as Hugging Face has it
    given = msgspec.json.decode((SAMPLES / f"{sample}.json").read_bytes(), type=Sample)
    told = given.metadata | (metadata or {})
    request = PlanRequest("r1", "m", Path("/m"), given.files, told, wishes, 256 * GIB, 2, devices=devices)
    return engine.plan(request)


def said(made: Plan, flag: str) -> str:
    for at, word in enumerate(made.spec.argv):
        if word == flag:
            return made.spec.argv[at + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return ""


def test_sglang_has_a_cache_of_eight_contexts_and_claims_what_goes_with_it() -> None:
    made = plan(SgLang(), (gpu(),), LLAMA)
    assert made.context == 8192
    assert said(made, "--max-total-tokens") == str(8 * 8192)
    assert 24 * GIB < made.devices[FIRST] < 28 * GIB
    assert not said(made, "--mem-fraction-static"), "its own share of what is free is large enough for that"
    more = plan(SgLang(), (gpu(),), LLAMA, cache_tokens=100_000)
    assert said(more, "--max-total-tokens") == "100000"
    assert more.devices[FIRST] > made.devices[FIRST]


def test_a_share_that_sglang_is_given_is_claimed_with_what_it_works_with() -> None:
    made = plan(SgLang(), (gpu(),), LLAMA, mem_fraction_static=0.5)
    assert said(made, "--mem-fraction-static") == "0.5"
    assert not said(made, "--max-total-tokens")
    assert 40 * GIB < made.devices[FIRST] < 46 * GIB


def test_sglang_is_spread_over_gpus_and_needs_as_many() -> None:
    made = plan(SgLang(), (gpu(0), gpu(1)), LLAMA, tp_size=2)
    assert made.spec.devices == tuple(made.devices) == (FIRST, "nvidia.com/gpu=1")
    with pytest.raises(UsageError, match="4 GPUs"):
        plan(SgLang(), (gpu(0), gpu(1)), LLAMA, tp_size=2, dp_size=2)
    with pytest.raises(OutOfMemory):
        plan(SgLang(), (gpu(free=8 * GIB),), LLAMA)
    with pytest.raises(UsageError, match="device"):
        plan(SgLang(), (), device="cpu")


def test_tensorrt_llm_is_told_its_caches_share_of_what_is_left() -> None:
    made = plan(TensorRtLlm(), (gpu(free=60 * GIB),), LLAMA)
    cache, left = (8 * 8192 + 128) * 131072, 60 * GIB - (made.devices[FIRST] - (8 * 8192 + 128) * 131072)
    assert float(said(made, "--kv_cache_free_gpu_memory_fraction")) == pytest.approx(cache / left, abs=1e-3)
    assert said(made, "--max_seq_len") == "8192"
    assert said(made, "--max_batch_size") == "64"
    bare = plan(TensorRtLlm(), (), LLAMA)
    assert not said(bare, "--kv_cache_free_gpu_memory_fraction"), "where nobody sees a GPU nothing is told"
    asked = plan(TensorRtLlm(), (gpu(),), LLAMA, gpu_memory_fraction=0.5)
    assert asked.devices == {FIRST: 40 * GIB}


def test_of_tensorrt_llms_own_formats_nobody_knows_the_shape_and_most_of_the_gpu_is_claimed() -> None:
    given = msgspec.json.decode((SAMPLES / "tensorrtllm.json").read_bytes(), type=Sample)
    request = PlanRequest("r1", "m", Path("/m"), given.files, given.metadata, devices=(gpu(),))
    assert TensorRtLlm().plan(request).devices == {FIRST: int(80 * GIB * 0.9)}


def test_triton_claims_a_gpu_for_what_only_nvidias_image_can_run_or_where_it_is_asked_for() -> None:
    onnx = plan(Triton(), (gpu(),))
    assert not onnx.devices
    assert not onnx.spec.devices
    asked = plan(Triton(), (gpu(),), device="cuda", instances=2)
    assert asked.spec.devices == (FIRST,)
    assert asked.spec.image is not None
    assert "tritonserver" in asked.spec.image.base
    assert GIB // 2 < asked.devices[FIRST] < 4 * GIB
    pair = plan(Triton(), (gpu(0), gpu(1), gpu(2)), device="cuda", gpus="0,2")
    assert list(pair.devices) == [FIRST, "nvidia.com/gpu=2"]
    assert not plan(Triton(), (gpu(),), device="cpu", server="image").spec.devices


def test_small_models_take_little_of_a_large_gpu() -> None:
    for engine in (SgLang(), TensorRtLlm()):
        made = plan(engine, (gpu(),), LLAMA | {"weights_bytes": 269_030_016, "layers": 30, "heads_kv": 3})
        assert made.devices[FIRST] < 8 * GIB, engine.name
    assert PER_TOKEN == 23040
