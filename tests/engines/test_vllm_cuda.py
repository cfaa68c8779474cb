"""vLLM's launch plans on NVIDIA's GPUs: what they take of whose memory, and what vLLM is told so that it takes that."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from tests.engines.test_vllm import GIB, draft, flags, lora, plan

from pierhead.engines.base import Plan
from pierhead.engines.gpus import Device
from pierhead.errors import OutOfMemory, UsageError

PER_TOKEN = 30 * 2 * 3 * 64 * 2  # of SmolLM2: layers, K and V, heads, their width, bytes
LLAMA = {  # Llama 3.1 8B
    "context_length": 131072,
    "embedding_length": 4096,
    "layers": 32,
    "heads": 32,
    "heads_kv": 8,
    "head_dim_k": 128,
    "head_dim_v": 128,
    "ffn_width": 14336,
    "vocab_size": 128256,
    "weights_bytes": 16_060_522_496,
    "dtypes": {"BF16": 16_060_522_496},
}


def gpu(number: int = 0, total: int = 80 * GIB, free: int = -1, **more: str) -> Device:
    told = {"capability": "9.0", "driver": "580.95.05", **more}
    return Device(
        name=f"nvidia.com/gpu={number}", title="NVIDIA H100", total=total, free=total if free < 0 else free, **told
    )


def said(made: Plan, name: str) -> str:
    return next((f.partition("=")[2] for f in flags(made) if f.startswith(f"--{name}=")), "")


def test_a_gpu_is_used_where_there_is_one_and_the_processor_where_nobody_sees_one() -> None:
    on_gpu, on_cpu = plan(devices=(gpu(),)), plan()
    assert on_gpu.spec.devices == tuple(on_gpu.devices) == ("nvidia.com/gpu=0",)
    assert on_gpu.spec.image is not None
    assert "vllm/vllm-openai" in on_gpu.spec.image.base
    assert not on_cpu.devices
    assert not on_cpu.spec.devices
    assert plan(devices=(gpu(),), device="cpu").spec == on_cpu.spec


@pytest.mark.parametrize("less", [{"driver": "535.1"}, {"capability": "7.0"}], ids=str)
def test_a_gpu_that_the_wheels_cannot_use_is_left_alone_unless_it_is_asked_for(less: dict[str, str]) -> None:
    old = gpu(**less)
    assert not plan(devices=(old,)).devices
    assert plan(devices=(old,), device="cuda").devices
    assert plan(devices=(old, gpu(1))).devices
    unknown = msgspec.structs.replace(old, driver="", capability="")
    assert plan(devices=(unknown,)).devices


def test_it_takes_what_the_model_needs_and_not_most_of_the_gpu() -> None:
    """8 contexts are cached, for 64 requests at a time."""
    made = plan(devices=(gpu(),))
    cache = (8 * 8192 + 128) * PER_TOKEN
    assert said(made, "kv-cache-memory-bytes") == str(cache)
    assert said(made, "max-num-seqs") == "64"
    assert said(made, "max-num-batched-tokens") == "8192"
    assert made.parallel == 64
    need = made.devices["nvidia.com/gpu=0"]
    assert cache + 269_030_016 + GIB // 2 < need < 4 * GIB
    share = float(said(made, "gpu-memory-utilization"))
    assert need - 80 * GIB / 10_000 <= share * 80 * GIB <= need


def test_of_a_large_model_the_cache_is_as_large_as_for_a_small_one_in_tokens() -> None:
    made = plan(devices=(gpu(),), metadata=LLAMA)
    assert made.context == 8192
    assert int(said(made, "kv-cache-memory-bytes")) == (8 * 8192 + 128) * 131072
    assert 24 * GIB < made.devices["nvidia.com/gpu=0"] < 28 * GIB


def test_how_much_is_cached_can_be_said_in_tokens() -> None:
    made = plan(devices=(gpu(),), cache_tokens=100_000, context=4096)
    assert said(made, "kv-cache-memory-bytes") == str((782 * 128 + 128) * PER_TOKEN)
    few = plan(devices=(gpu(),), parallel=2, context=4096)
    assert said(few, "kv-cache-memory-bytes") == str((2 * 4096 + 128) * PER_TOKEN), "no more than all requests need"


def test_on_a_small_gpu_fewer_contexts_are_cached_and_then_shorter_ones() -> None:
    """20 GiB are enough for the weights and a cache of one context, not of eight."""
    small = plan(devices=(gpu(total=20 * GIB),), metadata=LLAMA)
    assert small.context == 8192
    assert small.devices["nvidia.com/gpu=0"] <= 18 * GIB + GIB // 2
    tight = plan(devices=(gpu(free=int(17.5 * GIB)),), metadata=LLAMA)
    assert 512 <= tight.context < 8192
    assert tight.devices["nvidia.com/gpu=0"] <= 17.5 * GIB
    with pytest.raises(OutOfMemory, match="MiB of a GPU's memory") as refused:
        plan(devices=(gpu(free=12 * GIB),), metadata=LLAMA)
    assert refused.value.data["device"] == "nvidia.com/gpu=0"


def test_a_context_that_is_asked_for_is_not_made_smaller_so_that_idle_models_can_go() -> None:
    with pytest.raises(OutOfMemory) as refused:
        plan(devices=(gpu(free=20 * GIB),), metadata=LLAMA, context=8192)
    assert refused.value.data["needed"] > 24 * GIB


def test_with_memory_unknown_all_that_was_asked_for_is_planned() -> None:
    roomy = plan(1 << 62, devices=(gpu(free=1 << 62),), metadata=LLAMA)
    assert roomy.devices == plan(devices=(gpu(),), metadata=LLAMA).devices


def test_a_share_that_the_user_names_is_claimed_and_left_to_vllm() -> None:
    made = plan(devices=(gpu(),), gpu_memory_utilization=0.5)
    assert made.devices == {"nvidia.com/gpu=0": 40 * GIB}
    assert said(made, "gpu-memory-utilization") == "0.5"
    assert not said(made, "kv-cache-memory-bytes")


def test_over_several_gpus_the_model_and_its_cache_are_shared_out() -> None:
    pair = (gpu(0), gpu(1), gpu(2, free=GIB))
    made, alone = plan(devices=pair, metadata=LLAMA, tensor_parallel_size=2), plan(devices=(gpu(),), metadata=LLAMA)
    assert list(made.devices) == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]
    assert int(said(made, "kv-cache-memory-bytes")) == int(said(alone, "kv-cache-memory-bytes")) // 2
    assert made.devices["nvidia.com/gpu=1"] < alone.devices["nvidia.com/gpu=0"] * 0.6
    with pytest.raises(UsageError, match="2 GPUs"):
        plan(devices=(gpu(),), tensor_parallel_size=2)
    latent = {**LLAMA, "heads_kv": 1, "attention": {"kv_lora_rank": 512}}
    one, two = (plan(devices=pair, metadata=latent, tensor_parallel_size=n) for n in (1, 2))
    assert said(one, "kv-cache-memory-bytes") == said(two, "kv-cache-memory-bytes"), "each GPU has all of such a cache"


def test_only_the_gpus_that_are_named_are_used() -> None:
    pair = (gpu(0), gpu(1, free=40 * GIB))
    assert list(plan(devices=pair).devices) == ["nvidia.com/gpu=0"]
    assert list(plan(devices=pair, gpus="1").devices) == ["nvidia.com/gpu=1"]
    with pytest.raises(UsageError, match="gpu=7"):
        plan(devices=pair, gpus="7")


def test_the_steps_that_write_are_recorded_and_nothing_is_compiled() -> None:
    told = json.loads(said(plan(devices=(gpu(),)), "compilation-config"))
    assert told == {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    reader: dict[str, Any] = {"class": "BertModel", "causal": False}
    reads = plan(devices=(gpu(),), metadata=reader, context=512)
    assert "--enforce-eager" in flags(reads), "vLLM records no steps of a model that reads"
    assert not said(reads, "compilation-config")
    for own in ({"enforce_eager": False}, {"optimization_level": "2"}):
        assert json.dumps(told) not in flags(plan(devices=(gpu(),), **own))
        assert not said(plan(devices=(gpu(),), **own), "compilation-config")


def test_what_is_beside_the_model_counts() -> None:
    bare = plan(devices=(gpu(),))
    drafted = plan(devices=(gpu(),), beside=(draft(),), draft="small")
    assert int(said(drafted, "kv-cache-memory-bytes")) == 2 * int(said(bare, "kv-cache-memory-bytes"))
    more = drafted.devices["nvidia.com/gpu=0"] - bare.devices["nvidia.com/gpu=0"]
    assert more == int(said(bare, "kv-cache-memory-bytes")) + 269_030_016
    adapted = plan(devices=(gpu(),), beside=(lora("poet", 8),))
    assert adapted.devices["nvidia.com/gpu=0"] > bare.devices["nvidia.com/gpu=0"]


def test_asleep_the_weights_are_in_the_machines_own_memory() -> None:
    awake, sleeps = plan(devices=(gpu(),)), plan(devices=(gpu(),), enable_sleep_mode=True)
    assert sleeps.memory - awake.memory == 269_030_016
    assert sleeps.spec.sleep == ("/sleep?level=1", "/wake_up")
    assert sleeps.devices == awake.devices
    with pytest.raises(OutOfMemory, match="vLLM itself"):
        plan(GIB, devices=(gpu(),))


def test_whatever_it_makes_at_its_start_it_can_write() -> None:
    made = plan(devices=(gpu(),))
    caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")
    assert all(made.spec.env[name].startswith("/tmp/") for name in caches)
    assert made.spec.env["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert made.spec.tmp_size >= GIB
