"""The Triton engine: a model repository made of a model's files, and how tritonserver serves it; starts nothing."""

from __future__ import annotations

import difflib
import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pierhead.config import Settings
from pierhead.engines import serving
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
from pierhead.errors import UsageError
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
        done: dict[str, Any] = {}
        for given, value in settings.items():
            name = given.strip().lstrip("-").replace("-", "_").lower()
            name = _ALIASES.get(name, name)
            if name not in _KNOWN:
                raise _unknown(given, name)
            try:
                done[name] = _KNOWN[name](value)
            except (TypeError, ValueError) as exc:
                raise UsageError(f"the setting '{given}' cannot be {value!r}: {exc}") from exc
        return done

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        settings = self.validate(request.settings)
        made = repository.plan(request.model, request.files, settings)
        image = settings.get("server") or ("image" if _needs_image(request.files) else "wheel")
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
        notes = made.notes
        if image == "wheel" and any(f.format == "onnx" for f in request.files):
            notes += ("this tritonserver has no ONNX backend: its Python backend runs the model in ONNX Runtime",)
        return Plan(
            spec=self._spec(request, told, needed, made.main, image, settings), context=0, memory=needed, notes=notes
        )

    def _spec(
        self, request: PlanRequest, told: dict[str, Any], needed: int, main: str, image: str, settings: dict[str, Any]
    ) -> LaunchSpec:
        text = json.dumps(told, separators=(",", ":")).replace("$(", "$$(")
        ports = ("--port", "$(PORT)", "--metrics-port", "$(METRICS_PORT)")
        program = ("$(PYTHON)", "-I", "$(ENTRY)", "--model-dir", "$(MODEL_DIR)", "--settings", text, *ports)
        own = image == "wheel"
        return LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=beside(*program, health="/v2/health/ready"),
            model_dir=str(request.model_dir),
            entry=str(ENTRY),
            environment=Environment(WHEELS, PYTHON),
            env=serving.SILENT,
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
            devices=tuple(f"nvidia.com/gpu={gpu}" for gpu in settings.get("gpus", ("all",) if not own else ())),
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


def _memory(files: tuple[ModelFile, ...], processes: int, gpu: bool) -> int:
    """An estimate in bytes: the server, a process for each instance, and the weights with what runs beside them."""
    weights = sum(f.size for f in files if f.role == "weights")
    return SERVER + processes * PROCESS + weights * 5 // 4 + (CUDA if gpu else 0)


# --- settings -----------------------------------------------------------------------------------------------------


def _count(value: Any) -> int:
    number = int(value)
    if number < 0:
        raise ValueError("it must be a number from 0 on")
    return number


def _counts(value: Any) -> tuple[int, ...]:
    return tuple(_count(v) for v in _words(value))


def _words(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.split(",")
    given: list[Any] = list(value) if isinstance(value, list | tuple) else [value]  # pyright: ignore[reportUnknownArgumentType]
    return tuple(str(v).strip() for v in given if str(v).strip())


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        text = str(value).lower()
        if text not in choices:
            raise ValueError(f"it must be one of {', '.join(choices)}")
        return text

    return check


def _release(value: Any) -> str:
    text = str(value)
    if len(text) != 5 or text[2] != "." or not text.replace(".", "").isdecimal():
        raise ValueError("it must be a release of NVIDIA's image, such as 25.08")
    return text


_KNOWN: dict[str, Callable[[Any], Any]] = {
    "model": str,
    "file": str,
    "load": _words,
    "max_batch_size": _count,
    "preferred_batch_size": _counts,
    "max_queue_delay_microseconds": _count,
    "max_queue_size": _count,
    "instances": _count,
    "kind": _one_of("cpu", "gpu", "auto"),
    "threads": _count,
    "parallel": _count,
    "http_threads": _count,
    "server": _one_of("wheel", "image"),
    "release": _release,
    "gpus": _words,
    "shm_mib": _count,
    "verbose": _count,
}
_ALIASES = {
    "batch_size": "max_batch_size",
    "max_queue_delay": "max_queue_delay_microseconds",
    "instance_count": "instances",
    "http_thread_count": "http_threads",
}


def _unknown(given: str, name: str) -> UsageError:
    close = difflib.get_close_matches(name, [*_KNOWN, *_ALIASES], 1, 0.5)
    return UsageError(
        f"unknown setting '{given}' of the engine triton",
        hint=f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(_KNOWN)}.",
        data={"parameter": given, "closest": close[0] if close else None},
    )


def make(settings: Settings) -> Triton:
    """The engine as this installation has it."""
    return Triton(settings.runtime.base_image)
