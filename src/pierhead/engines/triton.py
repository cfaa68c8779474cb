"""The Triton engine: a model repository made of a model's files, and how tritonserver serves it; starts nothing."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pierhead.config import Settings
from pierhead.engines import gpus, serving
from pierhead.engines import triton_repository as repository
from pierhead.engines.base import (
    EngineFacts,
    Environment,
    ImageRecipe,
    LaunchSpec,
    Limits,
    Plan,
    PlanRequest,
    Readiness,
)
from pierhead.engines.bridge import beside, beside_file
from pierhead.engines.setting_table import Setting, Table
from pierhead.store.model import ModelFile

ENTRY = Path(__file__).with_name("triton_entry")
MIB = 1 << 20
# The last wheel that carries a whole tritonserver (2.51, of Triton 24.10); its Python backend needs NumPy 1.
WHEELS = ("nvidia-pytriton==0.7.0", "numpy==1.26.4", "onnxruntime==1.23.2")
PYTHON = "" if sys.version_info < (3, 13) else "3.12"  # the newest that NumPy 1 has wheels for
GLIBC = (2, 35)  # what the wheel asks for
IMAGE = "nvcr.io/nvidia/tritonserver"
RELEASE = "25.08"
SERVER, PROCESS = 160 * MIB, 120 * MIB  # tritonserver itself, and each process of its Python backend with ONNX Runtime
CUDA = 1200 * MIB  # what a CUDA context takes of the host's memory
# Of a GPU's: the context, and what each instance works with. Nobody knows the models' shapes, and none was measured.
ON_GPU, INSTANCE = 640 * MIB, 256 * MIB

FACTS = EngineFacts(
    name="triton",
    title="Triton",
    formats=("onnx", "tensorrt"),
    serves=("infer", "generate", "generate-stream", "triton-repository"),
    accelerators=("cpu", "cuda"),
    platforms=("linux/amd64",),
    common=("threads",),
    metrics={"waiting": "nv_inference_pending_request_count"},
    marks=("config.pbtxt",),
    parallel=0,
    untested="NVIDIA's image, GPUs and TensorRT plans; the server of the wheel on the CPU is tested",
)


class Triton:
    """Serves a Triton model repository, bare ONNX models and TensorRT plans."""

    name = FACTS.name
    facts = FACTS
    environment = Environment(WHEELS)

    def __init__(self, base_image: str = "") -> None:
        self._base_image = base_image

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether there is a model repository, an ONNX model or a TensorRT plan."""
        return bool(repository.roots(files) or repository.bare(files))

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``."""
        return ("infer",)

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings in canonical form; UsageError names an unknown one with its closest match."""
        done = _TABLE.canonical(settings)
        if "preferred_batch_size" in done:
            done["preferred_batch_size"] = tuple(int(size) for size in done["preferred_batch_size"])
        return done

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        settings = self.validate(request.settings)
        made = repository.plan(request.model, request.files, settings)
        image = _server(request, settings)
        needed = _memory(request.files, len(made.models) * int(settings.get("instances", 1)), image == "image")
        if request.free_memory and needed > request.free_memory:
            hint = "Stop another model, or load fewer of the repository's models with --option load=NAME."
            raise serving.too_large(request.model, {"as a guess": needed}, request.free_memory, hint=hint)
        told = {
            "models": [
                {"name": m.name, "files": m.files, "config": m.config, "threads": m.threads or request.cpus}
                for m in made.models
            ],
            "load": list(settings.get("load", ())) or ["*"],
            "flags": _flags(settings),
        }
        devices = _take(request, settings, len(made.models)) if image == "image" else {}
        notes = made.notes
        if image == "wheel" and any(f.format == "onnx" for f in request.files):
            notes += ("this tritonserver has no ONNX backend: its Python backend runs the model in ONNX Runtime",)
        spec = self._spec(request, told, needed, made.main, image, settings, devices)
        return Plan(spec=spec, context=0, memory=needed, devices=devices, notes=notes)

    def _spec(
        self,
        request: PlanRequest,
        told: dict[str, Any],
        needed: int,
        main: str,
        image: str,
        settings: dict[str, Any],
        devices: Mapping[str, int],
    ) -> LaunchSpec:
        text = json.dumps(told, separators=(",", ":")).replace("$(", "$$(")
        ports = ("--port", "$(PORT)", "--metrics-port", "$(METRICS_PORT)")
        program = ("$(PYTHON)", "-I", "$(ENTRY)", "--model-dir", "$(MODEL_DIR)", "--settings", text, *ports)
        own = image == "wheel"
        among = settings.get("gpus", ("all",) if not own else ())
        return LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=beside(*program, health="/v2/health/ready"),
            model_dir=str(request.model_dir),
            entry=str(ENTRY),
            environment=Environment(WHEELS, PYTHON),
            env=serving.ENV,
            image=ImageRecipe(
                self.name,
                self._base_image if own else f"{IMAGE}:{settings.get('release', RELEASE)}-py3",
                WHEELS if own else (),
                _image_files(),
                glibc=GLIBC,
                dependencies=own,
            ),
            limits=Limits(memory=needed * 5 // 4 + 512 * MIB, pids=4096),
            readiness=Readiness("/v2/health/ready", 600.0),
            devices=() if settings.get("device") == "cpu" else gpus.visible(devices, gpus.names(among)),
            shm_size=int(settings.get("shm_mib", 256)) * MIB,
            tmp_size=256 * MIB,
            serves=FACTS.serves,
            called=main,
        )


@functools.cache
def _image_files() -> tuple[tuple[str, str], ...]:
    return (*serving.files(ENTRY), beside_file())


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """The command line's options that settings stand for."""
    flags = ["--exit-timeout-secs=8"]
    if "http_threads" in settings:
        flags.append(f"--http-thread-count={settings['http_threads']}")
    if settings.get("verbose"):
        flags.append(f"--log-verbose={settings['verbose']}")
    return flags


def _needs_image(files: tuple[ModelFile, ...]) -> bool:
    """Whether there is something that only NVIDIA's image can run."""
    return any(f.role == "weights" and f.format not in ("onnx", "data", "", "numpy") for f in files)


def _server(request: PlanRequest, settings: Mapping[str, Any]) -> str:
    """Which tritonserver: ``image``, where something asks for it that the wheel cannot do."""
    asked = settings.get("server")
    return asked or ("image" if settings.get("device") == "cuda" or _needs_image(request.files) else "wheel")


def _take(request: PlanRequest, settings: Mapping[str, Any], models: int) -> dict[str, int]:
    """What is claimed of each GPU that is named, or of one."""
    if settings.get("device") == "cpu" or settings.get("kind") == "cpu":
        return {}
    among = tuple(settings.get("gpus", ("all",)))
    weights = sum(f.size for f in request.files if f.role == "weights")
    instances = models * max(1, int(settings.get("instances", 1)))
    need = ON_GPU + instances * INSTANCE + weights * 3 // 2
    return gpus.take(request.model, request.devices, need, count=len(set(among) - {"all"}) or 1, among=among)


def _memory(files: tuple[ModelFile, ...], processes: int, gpu: bool) -> int:
    """An estimate in bytes: the server, a process for each instance, and the weights with what runs beside them."""
    weights = sum(f.size for f in files if f.role == "weights")
    return SERVER + processes * PROCESS + weights * 5 // 4 + (CUDA if gpu else 0)


# --- settings -----------------------------------------------------------------------------------------------------

_MOST = 1 << 30
_SETTINGS = {
    "model": Setting(str, ""),
    "file": Setting(str, ""),
    "load": Setting(tuple, ()),
    "max_batch_size": Setting(int, 0, 0, _MOST),
    "preferred_batch_size": Setting(tuple, (), pattern=r"[0-9]{1,9}"),
    "max_queue_delay_microseconds": Setting(int, 0, 0, _MOST),
    "max_queue_size": Setting(int, 0, 0, _MOST),
    "instances": Setting(int, 1, 0, 1024),
    "kind": Setting(str, "auto", choices=("cpu", "gpu", "auto")),
    "threads": Setting(int, 0, 0, 1024),
    "parallel": Setting(int, 0, 0, _MOST),
    "http_threads": Setting(int, 0, 0, 1024),
    "device": Setting(str, "auto", choices=("auto", "cpu", "cuda")),
    "server": Setting(str, "", choices=("wheel", "image")),
    "release": Setting(str, RELEASE, pattern=r"\d\d\.\d\d"),
    "gpus": Setting(tuple, ("all",), pattern=r"[A-Za-z0-9][A-Za-z0-9._:-]*"),
    "shm_mib": Setting(int, 256, 0, _MOST),
    "verbose": Setting(int, 0, 0, 9),
}
_ALIASES = {
    "batch_size": "max_batch_size",
    "max_queue_delay": "max_queue_delay_microseconds",
    "instance_count": "instances",
    "http_thread_count": "http_threads",
}
_TABLE = Table("the engine triton", _SETTINGS, _ALIASES)


def make(settings: Settings) -> Triton:
    """The engine as this installation has it."""
    return Triton(settings.runtime.base_image)
