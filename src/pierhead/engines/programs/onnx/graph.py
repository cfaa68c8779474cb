"""An ONNX model that ONNX Runtime has loaded: what goes in, what comes out, and why it could not be."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cuda
from .faults import Unusable, bad
from .settings import Settings

# ONNX Runtime's names of types, as numpy and as the Open Inference Protocol have them.
TYPES: dict[str, tuple[str, str]] = {
    "tensor(float)": ("float32", "FP32"),
    "tensor(double)": ("float64", "FP64"),
    "tensor(float16)": ("float16", "FP16"),
    "tensor(int8)": ("int8", "INT8"),
    "tensor(int16)": ("int16", "INT16"),
    "tensor(int32)": ("int32", "INT32"),
    "tensor(int64)": ("int64", "INT64"),
    "tensor(uint8)": ("uint8", "UINT8"),
    "tensor(uint16)": ("uint16", "UINT16"),
    "tensor(uint32)": ("uint32", "UINT32"),
    "tensor(uint64)": ("uint64", "UINT64"),
    "tensor(bool)": ("bool", "BOOL"),
    "tensor(string)": ("object", "BYTES"),
}
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    "openvino": ("OpenVINOExecutionProvider", "CPUExecutionProvider"),
}
LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}


@dataclass(frozen=True)
class Port:
    """An input or output; a free dimension is -1. ``kind`` is numpy's, ``datatype`` the protocol's name of its type."""

    name: str
    kind: str
    datatype: str
    shape: tuple[int, ...]


class Graph:
    """A loaded model. ``batches``: its first dimension is free everywhere, so that requests can share a run."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = {port.name: port for port in map(_port, session.get_inputs())}
        self.outputs = {port.name: port for port in map(_port, session.get_outputs())}
        ports = (*self.inputs.values(), *self.outputs.values())
        self.batches = all(port.shape and port.shape[0] == -1 for port in ports)
        self._initializers = {port.name for port in session.get_overridable_initializers()}
        self._wrong = _mistakes()

    def run(self, feeds: dict[str, Any], wanted: list[str]) -> list[Any]:
        """The wanted outputs; Refused 400 where the model cannot work with these inputs."""
        try:
            return self._session.run(wanted, feeds)
        except self._wrong as exc:
            raise bad(f"the model cannot work with this input: {plain(str(exc))}", "model_refused") from exc

    @property
    def where(self) -> str:
        """The execution provider that counts."""
        return str(self._session.get_providers()[0])


def load(folder: Path, settings: Settings) -> Graph:
    """The model of these settings; Unusable with ONNX Runtime's reason."""
    ort: Any = importlib.import_module("onnxruntime")
    ort.disable_telemetry_events()
    path = folder / settings.file
    if not path.is_file():
        raise Unusable(f"{settings.file} is not in the model's folder")
    nvidia = settings.provider in ("cuda", "tensorrt")
    if nvidia:
        cuda.preload(ort)
    providers = _providers(ort, settings)
    try:
        session = ort.InferenceSession(str(path), sess_options=_options(ort, settings), providers=providers)
    except Exception as exc:  # ONNX Runtime's errors have no type in common; the reason is for a person
        raise Unusable(f"ONNX Runtime cannot load {settings.file}: {reason(str(exc))}") from exc
    wanted = providers[0][0]
    if session.get_providers()[0] != wanted:  # it would go on with the processor and say nothing
        why = cuda.amiss(settings.provider) if nvidia else ""
        raise Unusable(
            f"the execution provider {settings.provider} ({wanted}) does not work on this machine"
            + (f": {why}" if why else "")
        )
    try:
        return Graph(session)
    except KeyError as exc:
        raise Unusable(f"{settings.file} has an input or output of the type {exc.args[0]}, which is no tensor") from exc


def _providers(ort: Any, settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    names = PROVIDERS[settings.provider]
    there = set(ort.get_available_providers())
    if names[0] not in there:
        raise Unusable(f"this ONNX Runtime has no execution provider {settings.provider}; it has {', '.join(there)}")
    own = names[-2] if len(names) > 1 else names[0]  # TensorRT's provider knows none of CUDA's options
    options = {own: {str(k): str(v) for k, v in settings.provider_options.items()}}
    return [(name, options.get(name, {})) for name in names if name in there]


def _options(ort: Any, settings: Settings) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = settings.inter_threads
    if settings.inter_threads > 1:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[settings.optimization])
    options.enable_mem_pattern = False  # it keeps a plan for every shape that it ever saw
    options.enable_cpu_mem_arena = settings.arena
    options.log_severity_level = 3
    for pool in ("intra", "inter"):
        options.add_session_config_entry(f"session.{pool}_op.allow_spinning", str(int(settings.spin)))
    return options


def _mistakes() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises when the input is at fault (or cannot be told from it)."""
    state: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    return (state.InvalidArgument, state.RuntimeException, state.Fail)


def _port(found: Any) -> Port:
    kind, datatype = TYPES[found.type]
    shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in found.shape or ())
    return Port(found.name, kind, datatype, shape)


def plain(text: str) -> str:
    """ONNX Runtime's message without its number and the places in its own source, on one line."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(text.split()))
    text = re.sub(r"/\S+?/([^/\s]+\.(?:onnx|cc|h|data))(:\d+)?", r"\1", text)
    return text[:600]


def reason(text: str) -> str:
    """The same for a model that cannot be loaded, with what it means in front."""
    said = plain(text)
    for word, meaning in (
        ("Protobuf parsing failed", "it is not an ONNX file, or cut"),
        ("is not a registered function/op", "it uses an operator that this ONNX Runtime does not have"),
        ("No Op registered for", "it uses an operator that this ONNX Runtime does not have"),
        ("Could not find an implementation", "it uses an operator that this execution provider does not have"),
        ("External data path", "a file with its weights is missing"),
        ("external data", "a file with its weights is missing or too short"),
        ("bad_alloc", "there is not enough memory for it"),
        ("Failed to allocate memory", "there is not enough memory for it"),
        ("is under development and support for this is limited", "it needs a newer ONNX Runtime"),
        ("Unsupported model IR version", "it needs a newer ONNX Runtime"),
    ):
        if word.lower() in said.lower():
            return f"{meaning} ({said})"
    return said
