"""What the llama.cpp engine plans on machines with GPUs: which build, how many layers, how much of whose memory."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pierhead.config import RuntimeSettings
from pierhead.engines.base import PlanRequest
from pierhead.engines.gpus import Device
from pierhead.engines.llamacpp import ENTRY, LlamaCpp
from pierhead.engines.llamacpp_gpu import CPU, LIBRARIES, Wishes, build_for
from pierhead.errors import OutOfMemory, UsageError
from pierhead.events import ignore
from pierhead.formats.gguf import read_file, summary
from pierhead.formats.offload import offload
from pierhead.runtimes.base import Places, expand
from pierhead.runtimes.process import ProcessRuntime
from pierhead.runtimes.readiness import wait_ready
from pierhead.store.model import ModelFile

from .test_llamacpp import post

GIB = 1 << 30
PLACES = Places("/python", "/entry.py", "/model", "/s/engine.sock")
ENGINE = LlamaCpp()
LAYER = 4096 * 4096 * 13 // 256 * 144  # some 120 MB, as of 8 billion parameters in four bits
VOCABULARY = 4096 * 128256 // 256 * 210
EIGHT: dict[str, Any] = {
    "format": "gguf",
    "architecture": "llama",
    "weights_bytes": 2 * VOCABULARY + 32 * LAYER,
    "context_length": 131072,
    "layers": 32,
    "heads": 32,
    "heads_kv": 8,
    "head_dim_k": 128,
    "head_dim_v": 128,
    "embedding_length": 4096,
    "ffn_width": 14336,
    "vocab_size": 128256,
    "per_layer": [
        {"layers": list(range(32)), "bytes": LAYER, "tensors": {"ffn_up.weight": ["Q4_K", 4096, 14336]}},
    ],
    "other": {"token_embd.weight": ["Q6_K", 4096, 128256], "output.weight": ["Q6_K", 4096, 128256]},
}


def gpu(number: int = 0, free: float = 79, **more: Any) -> Device:
    facts = {"title": "NVIDIA H100", "capability": "9.0", "driver": "580.95.05", **more}
    return Device(
        name=f"nvidia.com/gpu={number}", total=int(facts.pop("total", 80) * GIB), free=int(free * GIB), **facts
    )


def ask(*devices: Device, free: float = 64, settle: bool = False, **settings: Any) -> PlanRequest:
    file = ModelFile("m.gguf", EIGHT["weights_bytes"])
    asked = PlanRequest("r1", "eight", Path("/m"), (file,), EIGHT, settings, int(free * GIB), 2)
    return dataclasses.replace(asked, devices=devices, settle=settle)


def inner(asked: PlanRequest) -> dict[str, Any]:
    """The settings as the engine's program will read them."""
    argv, _ = expand(ENGINE.plan(asked).spec, PLACES)
    return json.loads(argv[argv.index("--settings") + 1])


def test_a_machine_without_gpus_gets_the_plan_that_it_always_got() -> None:
    plain = ENGINE.plan(ask())
    assert plain == ENGINE.plan(ask(device="cpu")) == ENGINE.plan(ask(gpu(), device="cpu"))
    assert ENGINE.plan(ask(gpu(), n_gpu_layers=0)).devices == {}
    assert (plain.spec.environment, plain.devices, plain.spec.devices, plain.notes) == (None, {}, (), ())
    assert plain.spec.image is not None
    assert (plain.spec.image.index, len(plain.spec.image.requirements)) == ("", 1)
    assert not inner(ask()).keys() & {"n_gpu_layers", "tensor_split", "device", "gpus"}


def test_a_gpu_is_used_by_itself_with_every_layer() -> None:
    plan = ENGINE.plan(ask(gpu()))
    assert inner(ask(gpu()))["n_gpu_layers"] == 33
    assert plan.notes == ("33 of 33 layers on NVIDIA H100",)
    assert plan.spec.devices == ("nvidia.com/gpu=0",)
    need = plan.devices["nvidia.com/gpu=0"]
    assert 5.5 * GIB < need < 8 * GIB
    assert plan.memory < 2 * GIB  # the embedding, and the program
    assert plan.context == 8192
    assert plan.spec.limits.memory > plan.memory


def test_the_build_comes_with_nvidias_libraries_and_from_its_own_index() -> None:
    spec = ENGINE.plan(ask(gpu())).spec
    assert spec.environment is not None
    assert spec.image is not None
    assert spec.environment.index == spec.image.index == "https://xorbitsai.github.io/xllamacpp/whl/cu128"
    assert spec.environment.requirements == spec.image.requirements
    assert [pin.partition("==")[0] for pin in spec.environment.requirements] == [
        "xllamacpp",
        "nvidia-cuda-runtime-cu12",
        "nvidia-cublas-cu12",
    ]
    assert spec.image.glibc == (2, 35)
    mirrored = LlamaCpp(index="file:///srv/wheels/").plan(ask(gpu())).spec.environment
    assert mirrored is not None
    assert mirrored.index == "file:///srv/wheels/cu128"


@pytest.mark.parametrize(
    ("driver", "capability", "build"),
    [
        ("595.45.04", "9.0", "cu132"),
        ("600.1", "12.1", "cu132"),
        ("580.95.05", "8.9", "cu132"),  # its code is in there
        ("580.95.05", "9.0", "cu128"),  # its code has to be compiled, which this driver cannot for CUDA 13.2
        ("570.26", "9.0", "cu128"),
        ("595.45.04", "7.0", "cu128"),  # CUDA 13 knows no Volta
        ("550.54", "8.6", "cu128"),
        ("", "", "cu128"),
    ],
)
def test_the_driver_and_the_gpu_choose_the_build(driver: str, capability: str, build: str) -> None:
    assert build_for(Wishes("auto", ("all",), None), [gpu(driver=driver, capability=capability)]).name == build


def test_all_gpus_that_may_be_used_must_know_the_build() -> None:
    mixed = [gpu(0, driver="595.1", capability="9.0"), gpu(1, driver="595.1", capability="6.1")]
    assert build_for(Wishes("auto", ("all",), None), mixed).name == "cu128"
    assert build_for(Wishes("auto", ("0",), None), mixed).name == "cu132"


def test_a_driver_that_is_too_old_is_named() -> None:
    old = gpu(driver="535.10", capability="9.0")
    plan = ENGINE.plan(ask(old))
    assert plan.devices == {}
    assert "535.10" in plan.notes[0]
    with pytest.raises(UsageError, match=r"535\.10") as caught:
        ENGINE.plan(ask(old, device="cuda"))
    assert "--option device=cpu" in (caught.value.hint or "")


def test_what_does_not_fit_beside_others_asks_for_their_place_first() -> None:
    with pytest.raises(OutOfMemory, match="of a GPU's memory") as caught:
        ENGINE.plan(ask(gpu(free=4)))
    assert caught.value.data["device"] == "nvidia.com/gpu=0"
    assert caught.value.data["needed"] > 5 * GIB
    assert "n-gpu-layers" in (caught.value.hint or "")


def test_then_as_many_layers_go_as_fit() -> None:
    asked = ask(gpu(free=4, total=4), settle=True)
    plan, layers = ENGINE.plan(asked), inner(asked)["n_gpu_layers"]
    assert 10 < layers < 33
    assert plan.notes == (f"{layers} of 33 layers on NVIDIA H100; the rest on the processor",)
    assert plan.devices["nvidia.com/gpu=0"] <= 4 * GIB
    assert plan.context == 8192
    assert plan.memory > (33 - layers) * LAYER


def test_a_context_that_nobody_asked_for_is_made_shorter_before_layers_stay_behind() -> None:
    whole = ENGINE.plan(ask(gpu())).devices["nvidia.com/gpu=0"]
    cell = 32 * 2 * 8 * 128 * 2
    free = (whole - 4096 * cell) / GIB / 0.95
    short = ENGINE.plan(ask(gpu(free=free), settle=True))
    assert "33 of 33" in short.notes[0]
    assert 3840 <= short.context < 8192
    named = ENGINE.plan(ask(gpu(free=free), settle=True, context=8192))
    assert named.context == 8192
    assert "33 of 33" not in named.notes[0]
    too_short = ENGINE.plan(ask(gpu(free=(whole - 7000 * cell) / GIB / 0.95), settle=True))
    assert too_short.context == 8192
    assert "33 of 33" not in too_short.notes[0]


def test_a_gpu_without_room_for_a_layer_leaves_all_to_the_processor_unless_it_was_asked_for() -> None:
    full = gpu(free=0.7)
    plan = ENGINE.plan(ask(full, settle=True))
    plain = ENGINE.plan(ask())
    assert (plan.spec, plan.memory, plan.devices) == (plain.spec, plain.memory, {})
    assert "not one layer fits" in plan.notes[0]
    for wish in ({"device": "cuda"}, {"n_gpu_layers": 20}, {"n_gpu_layers": -2}):
        with pytest.raises(OutOfMemory) as caught:
            ENGINE.plan(ask(full, settle=True, **wish))
        assert caught.value.data["device"] == "nvidia.com/gpu=0"


def test_the_number_of_layers_can_be_named() -> None:
    asked = ask(gpu(), n_gpu_layers=10)
    plan = ENGINE.plan(asked)
    assert inner(asked)["n_gpu_layers"] == 10
    assert plan.notes == ("10 of 33 layers on NVIDIA H100; the rest on the processor",)
    assert plan.devices["nvidia.com/gpu=0"] < 4 * GIB
    assert inner(ask(gpu(), n_gpu_layers=-2))["n_gpu_layers"] == inner(ask(gpu(), ngl=999))["n_gpu_layers"] == 33


def test_the_machines_own_memory_counts_for_what_stays() -> None:
    with pytest.raises(OutOfMemory) as caught:
        ENGINE.plan(ask(gpu(), free=0.5))
    assert "device" not in caught.value.data
    assert caught.value.data["free"] == GIB // 2


def test_one_gpu_is_taken_where_one_is_enough_and_all_that_are_needed_else() -> None:
    assert ENGINE.plan(ask(gpu(0, 20), gpu(1, 70), gpu(2, 30))).devices.keys() == {"nvidia.com/gpu=1"}
    asked = ask(gpu(0, 5, total=5), gpu(1, 5.5, total=6))
    plan = ENGINE.plan(asked)
    assert plan.devices.keys() == {"nvidia.com/gpu=0", "nvidia.com/gpu=1"}
    assert inner(asked)["tensor_split"] == [1.0, 1.0] + [0.0] * 126
    assert sum(plan.devices.values()) > ENGINE.plan(ask(gpu())).devices["nvidia.com/gpu=0"]
    assert plan.notes == ("33 of 33 layers on NVIDIA H100 and NVIDIA H100",)


def test_only_the_gpus_that_are_named_are_used() -> None:
    assert ENGINE.plan(ask(gpu(0), gpu(1, 10), gpus="1")).devices.keys() == {"nvidia.com/gpu=1"}
    with pytest.raises(UsageError, match="gpu=7"):
        ENGINE.plan(ask(gpu(0), gpus="7"))


def test_where_nobody_knows_the_gpus_all_is_planned_and_nothing_claimed() -> None:
    for wish, names, build in (
        ({"device": "cuda"}, ("nvidia.com/gpu=all",), "cu128"),
        ({"device": "cuda", "gpus": "0, 1"}, ("nvidia.com/gpu=0", "nvidia.com/gpu=1"), "cu128"),
        ({"device": "rocm"}, ("amd.com/gpu=all",), "rocm-7.2.4"),
        ({"device": "vulkan"}, ("intel.com/gpu=all",), "vulkan"),
    ):
        asked = ask(**wish)
        plan = ENGINE.plan(asked)
        assert plan.spec.environment is not None
        assert (plan.devices, plan.spec.devices) == ({}, names)
        assert plan.spec.environment.index.endswith(f"/{build}")
        assert inner(asked)["n_gpu_layers"] == 33
    assert ENGINE.plan(ask(gpu(), device="vulkan")).spec.devices == ("nvidia.com/gpu=all",)


def test_all_is_planned_where_memory_is_not_known() -> None:
    roomy = dataclasses.replace(ask(gpu(free=1 << 32, total=4)), free_memory=0)
    assert "33 of 33" in ENGINE.plan(roomy).notes[0]


def test_drafts_adapters_and_projectors_count_on_the_gpu() -> None:
    plain = ENGINE.plan(ask(gpu())).devices["nvidia.com/gpu=0"]
    asked = ask(gpu())
    more = (ModelFile("a.gguf", GIB, role="lora"), ModelFile("p.gguf", GIB, role="mmproj"))
    found = ENGINE.plan(dataclasses.replace(asked, files=(*asked.files, *more))).devices["nvidia.com/gpu=0"]
    assert found - plain == 3 * GIB  # a projector's work is taken to need its size again


def test_a_cache_that_is_to_stay_does() -> None:
    stays = ENGINE.plan(ask(gpu(), no_kv_offload=True))
    goes = ENGINE.plan(ask(gpu()))
    moved = goes.devices["nvidia.com/gpu=0"] - stays.devices["nvidia.com/gpu=0"]
    assert moved == stays.memory - goes.memory == GIB


@pytest.mark.parametrize("wish", [{"device": "tpu"}, {"device": 3}, {"device": []}])
def test_an_unknown_device_is_refused_with_the_choices(wish: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="device") as caught:
        ENGINE.validate(wish)
    assert "cuda" in (caught.value.hint or "")


@given(
    free=st.lists(st.floats(0, 12), min_size=1, max_size=3),
    memory=st.floats(2, 20),
    context=st.none() | st.integers(256, 65536),
    layers=st.none() | st.integers(-2, 40),
)
@hypothesis_settings(max_examples=60, deadline=4000)
def test_no_plan_claims_more_than_is_free(
    free: list[float], memory: float, context: int | None, layers: int | None
) -> None:
    devices = [gpu(number, size, total=12) for number, size in enumerate(free)]
    wishes = {"context": context, "n_gpu_layers": layers}
    asked = ask(*devices, free=memory, settle=True, **{k: v for k, v in wishes.items() if v is not None})
    try:
        plan = ENGINE.plan(asked)
    except OutOfMemory:
        return
    assert plan.memory <= memory * GIB
    for device in devices:
        assert plan.devices.get(device.name, 0) <= device.free
    if plan.devices:
        told = inner(asked)
        split = 1 if "tensor_split" not in told else int(sum(told["tensor_split"]))
        assert len(plan.devices) == split
        assert plan.context == (context or plan.context)
        least = offload(EIGHT, layers=told["n_gpu_layers"], gpus=split, context=plan.context)
        assert min(plan.devices.values()) >= least.gpu.total


def test_a_build_that_lacks_nvidias_libraries_finds_them_beside_itself(tmp_path: Path) -> None:
    """As the wheels of CUDA have them: the entry loads what is there and tries again."""
    runtime = tmp_path / "nvidia" / "cuda_runtime" / "lib"
    runtime.mkdir(parents=True)
    place = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    libm = next((line.split("=> ")[1] for line in place.splitlines() if "libm.so.6" in line), "")
    if not libm:
        pytest.skip(f"no libm.so.6 that could stand for a library of NVIDIA's ({platform.machine()})")
    (runtime / "libcudart.so.12").symlink_to(libm)
    (tmp_path / "xllamacpp.py").write_text(
        "import os, sys\n"
        "tries = int(os.environ.get('TRIES', '0')) + 1\n"
        "os.environ['TRIES'] = str(tries)\n"
        "if tries == 1:\n    raise ImportError('libcudart.so.12: cannot open shared object file')\n"
    )
    program = (
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); m = runpy.run_path({str(ENTRY)!r}); m['load']()"
    )
    code = f"{program}; import os; print(os.environ['TRIES'], m['libraries']('libcudart'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout.split() == ["2", f"['{runtime / 'libcudart.so.12'}']"], done.stderr
    code = program
    (runtime / "libcudart.so.12").unlink()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert "libcudart.so.12: cannot open" in done.stderr


def test_an_engine_that_cannot_use_the_gpu_ends_instead_of_using_the_processor(tmp_path: Path) -> None:
    told = json.dumps({"gpus": 1, "n_gpu_layers": 33, "model": "m.gguf"})
    places = ["--socket", str(tmp_path / "s"), "--model-dir", str(tmp_path), "--settings", told]
    done = subprocess.run(
        [sys.executable, "-I", str(ENTRY), *places], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "can use 0 of 1 GPUs" in done.stderr


TOY = """
import sys
import types
print("a toy build", file=sys.stderr, flush=True)
_own = get_device_info
def get_device_info():
    kind = types.SimpleNamespace(name="GGML_BACKEND_DEVICE_TYPE_GPU")
    return [*_own(), {"description": "a toy", "type": kind}]
"""


def an_index(folder: Path) -> str:
    """With a build for CUDA that is Pierhead's own and believes in a GPU."""
    own = importlib.metadata.distribution("xllamacpp")
    place = folder / "cu128" / "xllamacpp"
    place.mkdir(parents=True)
    name = f"xllamacpp-{own.version}-cp310-abi3-linux_{platform.machine()}.whl"
    with zipfile.ZipFile(place / name, "w") as wheel:
        for file in own.files or ():
            path = Path(str(own.locate_file(file)))
            if file.name == "__init__.py":
                wheel.writestr(str(file), path.read_text() + TOY)
            elif file.suffix != ".pyc" and file.name != "RECORD":
                wheel.write(path, str(file))
        wheel.writestr(f"xllamacpp-{own.version}.dist-info/RECORD", "xllamacpp/__init__.py,,\n")
    (place / "index.html").write_text(f'<a href="{name}">xllamacpp</a>')
    return folder.as_uri()


def small(smollm2: Path) -> PlanRequest:
    """A real model and a GPU that is not there."""
    weights = (ModelFile(smollm2.name, smollm2.stat().st_size),)
    metadata = summary(read_file(smollm2))
    asked = PlanRequest("rgpu", "smollm2", smollm2.parent, weights, metadata, {"context": 512}, 4 * GIB, 2)
    return dataclasses.replace(asked, devices=(gpu(),))


async def test_the_build_of_an_index_is_installed_and_answers_in_the_sandbox(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the GPU: its driver's part is played by the processor."""
    monkeypatch.setitem(LIBRARIES, "cu128", ("iniconfig==2.1.0",))
    with tempfile.TemporaryDirectory(prefix="gpu-", dir="/tmp") as folder:
        engine = LlamaCpp(index=an_index(Path(folder) / "index"))
        plan = engine.plan(small(smollm2))
        assert plan.notes == ("31 of 31 layers on NVIDIA H100",)
        runtime = ProcessRuntime(Path(folder) / "replicas", RuntimeSettings())
        spec = await runtime.prepare(plan.spec, ignore)
        instance = await runtime.start(spec)
        try:
            await wait_ready(instance, timeout=60)
            answer = await post(instance.socket, "/v1/completions", {"prompt": "One, two,", "max_tokens": 4})
            assert answer["choices"][0]["text"]
            assert "a toy build" in b"".join([part async for part in instance.logs()]).decode()
        finally:
            await instance.stop()


def test_the_processors_build_has_no_environment_of_its_own() -> None:
    assert CPU.environment("1", "https://x") is None
    assert CPU.requirements("1") == ("xllamacpp==1",)
