"""An ONNX model in Triton's Python backend, for a tritonserver that has no backend of its own for these.

Runs inside tritonserver's Python process, linked as ``model.py`` beside each version's ``model.onnx``.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import Any

numpy: Any = importlib.import_module("numpy")
onnxruntime: Any = importlib.import_module("onnxruntime")
backend: Any = importlib.import_module("triton_python_backend_utils")

TYPES = {
    "float16": "FP16",
    "float": "FP32",
    "double": "FP64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "bool": "BOOL",
    "string": "STRING",
}
BATCH = 32  # the most at a time where nothing is said and the model takes any


class TritonPythonModel:
    """What Triton's Python backend calls."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Add what the configuration leaves out: the model's own inputs and outputs, and how many go together."""
        config: dict[str, Any] = auto_complete_model_config.as_dict()
        session = opened(config, folder(), 1)
        tensors = [*session.get_inputs(), *session.get_outputs()]
        batched = int(config.get("max_batch_size") or 0)
        if not (config.get("input") or config.get("output") or batched) and all(open_ended(t.shape) for t in tensors):
            batched = BATCH
            auto_complete_model_config.set_max_batch_size(batched)
        for tensor in session.get_inputs():
            auto_complete_model_config.add_input(described(tensor, batched > 0))
        for tensor in session.get_outputs():
            auto_complete_model_config.add_output(described(tensor, batched > 0))
        if batched and not config.get("dynamic_batching") and not config.get("sequence_batching"):
            auto_complete_model_config.set_dynamic_batching()
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model."""
        config: dict[str, Any] = json.loads(args["model_config"])
        place = os.path.join(args["model_repository"], args["model_version"])
        self.session = opened(config, place, threads(config))
        self.inputs: list[str] = [i.name for i in self.session.get_inputs()]
        self.outputs: list[str] = [o["name"] for o in config["output"]]
        self.batched = int(config.get("max_batch_size") or 0) > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run requests that fit together as one; each gets its own rows, or its own reason."""
        given = [self.feed(request) for request in requests]
        if self.batched and len(given) > 1 and all(together(given[0], other) for other in given[1:]):
            return self.at_once(given)
        return [self.alone(one) for one in given]

    def feed(self, request: Any) -> dict[str, Any]:
        """A request's tensors by name."""
        found: dict[str, Any] = {}
        for name in self.inputs:
            tensor = backend.get_input_tensor_by_name(request, name)
            if tensor is not None:
                found[name] = tensor.as_numpy()
        return found

    def at_once(self, given: list[dict[str, Any]]) -> list[Any]:
        """One run for all of them."""
        joined = {name: numpy.concatenate([one[name] for one in given]) for name in given[0]}
        try:
            results = self.session.run(self.outputs, joined)
        except Exception:  # whose fault it is shows when each runs alone
            return [self.alone(one) for one in given]
        sizes = [len(next(iter(one.values()))) for one in given]
        if any(len(result) != sum(sizes) for result in results):
            return [self.alone(one) for one in given]
        answers: list[Any] = []
        start = 0
        for size in sizes:
            answers.append(self.answer([result[start : start + size] for result in results]))
            start += size
        return answers

    def alone(self, one: dict[str, Any]) -> Any:
        """One run for one of them; the runtime's own words where it fails."""
        try:
            return self.answer(self.session.run(self.outputs, one))
        except Exception as exc:
            return backend.InferenceResponse(error=backend.TritonError(str(exc)))

    def answer(self, results: list[Any]) -> Any:
        """The response with these tensors."""
        pairs = zip(self.outputs, results, strict=True)
        return backend.InferenceResponse([backend.Tensor(name, numpy.ascontiguousarray(r)) for name, r in pairs])


def opened(config: dict[str, Any], place: str, count: int) -> Any:
    """A session of the model in a version's folder."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count
    options.log_severity_level = 3
    path = os.path.realpath(os.path.join(place, parameter(config, "onnx_file") or "model.onnx"))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def parameter(config: dict[str, Any], name: str) -> str:
    """A string of the configuration's parameters."""
    found: dict[str, dict[str, Any]] = config.get("parameters") or {}
    return str(found[name].get("string_value", "")) if name in found else ""


def threads(config: dict[str, Any]) -> int:
    """How many threads one run may use (0: ONNX Runtime decides)."""
    said = parameter(config, "threads")
    return int(said) if said.isdigit() else 0


def folder() -> str:
    """The version's folder: that of this file's link."""
    return os.path.dirname(os.path.abspath(__file__))


def open_ended(shape: list[Any]) -> bool:
    """Whether the first dimension may be anything, as a batch's is."""
    return bool(shape) and not isinstance(shape[0], int)


def described(tensor: Any, batched: bool) -> dict[str, Any]:
    """A tensor as Triton's configuration has it."""
    kind = tensor.type.removeprefix("tensor(").removesuffix(")")
    if kind not in TYPES:
        raise backend.TritonModelException(
            f"the tensor '{tensor.name}' is a {tensor.type}, which Triton has no word for"
        )
    shape = tensor.shape[1:] if batched else tensor.shape
    dims = [size if isinstance(size, int) and size > 0 else -1 for size in shape]
    return {"name": tensor.name, "data_type": f"TYPE_{TYPES[kind]}", "dims": dims}


def together(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two requests differ in their number of rows only."""
    return one.keys() == other.keys() and all(one[n].shape[1:] == other[n].shape[1:] for n in one)
