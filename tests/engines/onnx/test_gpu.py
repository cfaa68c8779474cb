"""The ONNX engine on NVIDIA's GPUs: what it takes of them, and that it never goes on with the processor silently."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pierhead.engines.base import Plan, PlanRequest
from pierhead.engines.gpus import Device
from pierhead.engines.onnx import Onnx
from pierhead.engines.programs.onnx import cuda, graph
from pierhead.engines.programs.onnx.faults import Unusable
from pierhead.engines.programs.onnx.settings import Settings
from pierhead.errors import OutOfMemory, UsageError
from pierhead.store.model import ModelFile

GIB = 1 << 30
GPU = Device(name="nvidia.com/gpu=0", title="NVIDIA L4", total=24 * GIB, free=24 * GIB)
BERT = {
    "weights_bytes": 90_000_000,
    "heads": 12,
    "embedding_length": 384,
    "context_length": 512,
    "inputs": [{"name": "x", "shape": ["n", 4], "type": "float32"}],
    "outputs": [{"name": "y", "shape": ["n", 2]}],
}


def plan(devices: tuple[Device, ...] = (GPU,), /, **settings: Any) -> Plan:
    files = (ModelFile("model.onnx", 90_000_000, "weights", format="onnx"),)
    return Onnx().plan(PlanRequest("r1", "m", Path("/m"), files, BERT, settings, 8 * GIB, 2, devices=devices))


def told(made: Plan) -> dict[str, Any]:
    return json.loads(made.spec.argv[made.spec.argv.index("--settings") + 1])


def test_nobody_gets_a_gpu_unasked_and_without_one_plans_are_the_same() -> None:
    assert plan().spec == plan(()).spec
    assert told(plan())["provider"] == "cpu"
    assert not plan().devices
    assert plan(device="auto").spec == plan(device="cpu").spec == plan(provider="cpu").spec == plan().spec


@pytest.mark.parametrize("wish", [{"device": "cuda"}, {"provider": "cuda"}, {"device": "CUDA", "provider": "cuda"}])
def test_the_arena_is_bounded_by_what_is_claimed(wish: dict[str, str]) -> None:
    made = plan(**wish)
    options = told(made)["provider_options"]
    assert told(made)["provider"] == "cuda"
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert 90_000_000 < options["gpu_mem_limit"] < made.devices["nvidia.com/gpu=0"] < 4 * GIB
    assert made.spec.devices == ("nvidia.com/gpu=0",)
    assert made.memory > plan().memory
    more = plan(**wish, gpu_mem_limit="4GiB")
    assert told(more)["provider_options"]["gpu_mem_limit"] == 4 * GIB
    assert more.devices["nvidia.com/gpu=0"] > 4 * GIB


def test_the_gpu_that_is_named_is_the_first_one_inside() -> None:
    pair = (GPU, Device(name="nvidia.com/gpu=1", title="NVIDIA L4", total=24 * GIB, free=8 * GIB))
    for wish in ({"device": "1"}, {"provider": "cuda", "device_id": "1"}, {"device": "cuda", "gpus": "1"}):
        made = plan(pair, **wish)
        assert made.spec.devices == ("nvidia.com/gpu=1",)
        assert "device_id" not in told(made)["provider_options"]
    assert plan((), provider="cuda", device="1").spec.devices == ("nvidia.com/gpu=1",)


def test_a_gpu_that_is_too_full_is_told_with_its_name() -> None:
    with pytest.raises(OutOfMemory) as refused:
        plan((Device(name="nvidia.com/gpu=0", title="NVIDIA L4", total=24 * GIB, free=GIB // 2),), device="cuda")
    assert refused.value.data["device"] == "nvidia.com/gpu=0"


@pytest.mark.parametrize("wish", [{"device": "GPU"}, {"provider": "cpu", "device": "cuda"}, {"device": "vulkan"}])
def test_a_device_that_the_provider_does_not_have_is_refused(wish: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="has no device"):
        plan(**wish)


def test_openvinos_devices_keep_their_names() -> None:
    assert told(plan(provider="openvino", device="NPU"))["provider_options"] == {"device_type": "NPU"}


class Session:
    """ONNX Runtime's, on a machine where its CUDA provider could not be loaded."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def without_cuda(monkeypatch: pytest.MonkeyPatch, preloaded: list[bool]) -> None:
    options = SimpleNamespace(add_session_config_entry=lambda *_: None)
    ort = SimpleNamespace(
        InferenceSession=Session,
        SessionOptions=lambda: options,
        GraphOptimizationLevel=SimpleNamespace(ORT_ENABLE_ALL=99),
        disable_telemetry_events=lambda: None,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        preload_dlls=lambda: preloaded.append(True),
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)  # pyright: ignore[reportArgumentType]


def test_a_provider_that_could_not_be_loaded_is_an_error_with_the_library_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    preloaded: list[bool] = []
    without_cuda(monkeypatch, preloaded)
    monkeypatch.setattr(cuda, "NEEDED", {"cuda": ("libc.so.6", "libabsent.so.{0}"), "tensorrt": ("libgone.so.1",)})
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(Unusable, match=r"cuda .* does not work on this machine: libabsent.so.13 cannot be loaded"):
        graph.load(tmp_path, Settings(provider="cuda"))
    assert preloaded


def test_a_driver_that_refuses_is_told_with_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "NEEDED", {"cuda": ("libc.so.6",), "tensorrt": ("libgone.so.1",)})
    driver = SimpleNamespace(cuInit=lambda flags: 100)
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: driver)
    assert cuda.amiss("cuda") == "the driver sees no GPU"
    driver.cuInit = lambda flags: 803
    assert "error 803" in cuda.amiss("cuda")
    driver.cuInit = lambda flags: 0
    assert cuda.amiss("cuda") == ""
