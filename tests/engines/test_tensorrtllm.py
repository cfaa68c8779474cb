"""TensorRT-LLM's launch plans, the jobs that build its engines, and the keys of what these make; nothing runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pierhead.engines.base import PlanRequest
from pierhead.engines.builds import Build, Gpu, key
from pierhead.engines.tensorrtllm import TensorRtLlm
from pierhead.engines.triton import Triton
from pierhead.errors import UsageError
from pierhead.store.classify import classify
from pierhead.store.model import ModelFile

H100 = Gpu("NVIDIA H100 80GB HBM3", "580.65.06", "9.0")
BUILD = Build(tool="trtllm-build", version="1.0.0", argv=("x",), settings={"--max_seq_len": "4096"})


def files(*names: str) -> tuple[ModelFile, ...]:
    return tuple(ModelFile(n, 1000, role, format=form) for n in names for role, form in [classify(n)])


def plan(*names: str, **settings: Any) -> Any:
    wanted = TensorRtLlm().validate(settings)
    return TensorRtLlm().plan(PlanRequest("r1", "m", Path("/m"), files(*names), {}, wanted, 64 << 30, 2)).spec


def test_a_checkpoint_is_built_and_the_engine_started_with_what_was_built() -> None:
    spec = plan("config.json", "rank0.safetensors", "rank1.safetensors", context=4096, gemm_plugin="auto")
    assert spec.build is not None
    assert spec.build.argv == (
        *("trtllm-build", "--checkpoint_dir", "$(MODEL_DIR)", "--output_dir", "$(OUTPUT)"),
        *("--gemm_plugin", "auto", "--max_seq_len", "4096"),
    )
    assert spec.argv[spec.argv.index("serve") + 1] == "$(BUILT)"


def test_an_engine_or_a_hugging_face_folder_is_served_as_it_is() -> None:
    engine = plan("config.json", "rank0.engine")
    assert engine.build is None
    assert engine.argv[engine.argv.index("serve") + 1] == "$(MODEL_DIR)"
    assert "trt" in engine.argv
    folder = plan("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", tensor_parallel_size=2)
    assert "pytorch" in folder.argv
    assert folder.argv[-2:] == ("--tp_size", "2")
    assert folder.image is not None
    assert folder.image.base.startswith("nvcr.io/nvidia/tensorrt-llm/release:")


def test_a_plan_for_triton_is_not_an_engine_for_tensorrt_llm_and_the_other_way_round() -> None:
    assert not TensorRtLlm().accepts(files("config.json", "model.plan"))
    assert Triton().accepts(files("model.plan"))
    assert not Triton().accepts(files("config.json", "rank0.engine"))


@pytest.mark.parametrize("setting", [{"tp_size": 0}, {"gpu_memory_fraction": 1.5}, {"reasoning_parser": "--evil"}])
def test_a_value_that_cannot_be_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TensorRtLlm().validate(setting)


def test_a_key_is_the_same_for_equal_machines_and_another_for_any_difference() -> None:
    other = Gpu("NVIDIA L4", "580.65.06", "8.9")
    one = key(BUILD, "sha256:a", (H100, other), "x86_64")
    assert key(BUILD, "sha256:a", (other, H100), "x86_64") == one
    different = [
        key(BUILD, "sha256:b", (H100, other), "x86_64"),
        key(BUILD, "sha256:a", (H100,), "x86_64"),
        key(BUILD, "sha256:a", (Gpu(H100.name, "590.1", "9.0"), other), "x86_64"),
        key(BUILD, "sha256:a", (H100, other), "aarch64"),
        key(Build(tool="trtllm-build", version="1.1.0", argv=("x",)), "sha256:a", (H100, other), "x86_64"),
        key(Build(tool="trtllm-build", version="1.0.0", argv=("x",)), "sha256:a", (H100, other), "x86_64"),
    ]
    assert len({one, *different}) == 7
