"""The ONNX Runtime engine: turns an ONNX model and settings into a launch plan; pure, starts nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pierhead.config import Settings
from pierhead.engines import gpus, serving
from pierhead.engines.base import EngineFacts, Environment, ImageRecipe, LaunchSpec, Limits, Plan, PlanRequest
from pierhead.engines.onnx_settings import TABLE
from pierhead.errors import UsageError
from pierhead.formats.onnx_estimate import OnnxEstimate, estimate_onnx
from pierhead.store.model import ModelFile

MIB = 1 << 20
# What ONNX Runtime takes of a GPU beside its arena, CUDA's context and the workspaces of its libraries, and of the
# machine's own memory beside what it takes without a GPU. Not measured yet.
CUDA_GPU, CUDA_HOST = 640 * MIB, 1024 * MIB
ARENA = 256 * MIB  # for the libraries' scratch memory and the gaps between what the arena holds; not measured either
BODIES = 16  # times the largest request that requests and answers may take, beside the model
SEQUENCE = 512  # tokens of a text where the model does not say how many it reads
_SERVER = (
    "tokenizers==0.23.3",
    "numpy==2.4.6",
    "msgspec==0.22.0",
    "uvicorn==0.54.0",
    "httptools==0.9.0",
    "uvloop==0.23.0",
    "click==8.5.1",
    "h11==0.16.0",
)
# Execution provider → the distribution of ONNX Runtime that has it.
RUNTIMES = {
    "cpu": "onnxruntime==1.32.0",
    "cuda": "onnxruntime-gpu[cuda,cudnn]==1.31.1",  # for CUDA 13
    "tensorrt": "onnxruntime-gpu[cuda,cudnn]==1.31.1",
    "openvino": "onnxruntime-openvino==1.24.1",
}
NVIDIA = ("cuda", "tensorrt")
UNTRIED = "the execution provider {} is not tested: that needs an NVIDIA GPU"
# What a model is for → the operations that it answers.
SERVES: dict[str, tuple[str, ...]] = {
    "classify": ("classify", "infer", "predict"),
    "tokens": ("classify", "infer", "predict"),
    "embeddings": ("embeddings", "score", "infer", "predict"),
    "rerank": ("rerank", "score", "infer", "predict"),
    "tensors": ("infer", "predict"),
}
FACTS = EngineFacts(
    name="onnx",
    title="ONNX Runtime",
    formats=("onnx",),
    serves=("classify", "embeddings", "rerank", "score", "infer", "predict"),
    accelerators=("cpu", "cuda", "openvino"),
    common=("context", "threads", "pooling", "normalize"),
    parallel=0,
    metrics={
        "running": "onnx_running",
        "waiting": "onnx_queue_size",
        "prompt_tokens": "onnx_prompt_tokens_total",
    },
    untested="the execution providers CUDA and TensorRT: they need an NVIDIA GPU",
)


def make(settings: Settings) -> Onnx:
    """The engine as the configuration wants it."""
    return Onnx(settings.runtime.base_image)


class Onnx:
    """Serves ONNX models through ONNX Runtime: classification, embeddings, ranking, and any tensors."""

    name = FACTS.name
    facts = FACTS

    def __init__(self, base_image: str = "") -> None:
        self._base_image = base_image

    @staticmethod
    def environment(provider: str = "cpu") -> Environment:
        """The wheels that the server needs for an execution provider."""
        return Environment((RUNTIMES[provider], *_SERVER))

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether there is an ONNX graph."""
        return bool(_graphs(files))

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``."""
        task = _task(files, metadata, _file(files, ""), "auto")
        return tuple(name for name in SERVES[task] if name != "score")

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings in canonical form; UsageError names an unknown one with its closest match."""
        return TABLE.canonical(settings)

    def defaults(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What holds where nobody says anything."""
        return TABLE.defaults

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        given = TABLE.canonical(request.settings)
        settings = _placed(TABLE.defaults | given)
        file = _chosen(request, settings["file"])
        task = _task(request.files, request.metadata, file, settings["task"])
        context = _context(request, settings["context"]) if task != "tensors" else 0
        if context and "max_batch_tokens" not in given:
            settings["max_batch_tokens"] = max(settings["max_batch_tokens"], context)
        needed = _estimate(request, settings, file, context or _longest(request, settings, file))
        taken, visible = _taken(request, settings, needed)
        if visible:
            needed = OnnxEstimate(needed.weights, needed.compute, needed.overhead + CUDA_HOST)
        if request.free_memory and needed.total > request.free_memory:
            raise serving.too_large(
                request.model,
                {"weights": needed.weights, "one batch": needed.compute, "program": needed.overhead},
                request.free_memory,
                hint="Try --option max-batch-tokens=512, a smaller --context, an int8 model, or stop another model.",
                **needed.to_dict(),
            )
        server = _server(request, settings | {"context": context or _longest(request, settings, file)}, file, task)
        return Plan(
            spec=self._spec(request, server, needed, task, visible),
            context=context,
            memory=needed.total,
            devices=taken,
            notes=(UNTRIED.format(settings["provider"]),) if visible else (),
        )

    def _spec(
        self, request: PlanRequest, server: dict[str, Any], needed: OnnxEstimate, task: str, devices: tuple[str, ...]
    ) -> LaunchSpec:
        environment, gpu = self.environment(server["provider"]), server["provider"] in NVIDIA
        return LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=serving.command(server, "onnx"),
            model_dir=str(request.model_dir),
            entry=str(serving.PROGRAMS),
            environment=environment,
            env=serving.ENV,
            image=ImageRecipe(
                self.name, self._base_image, environment.requirements, serving.program_files("onnx"), dependencies=gpu
            ),
            limits=Limits(memory=needed.total * 5 // 4 + max(512 * MIB, BODIES * server["max_body"])),
            devices=devices,
            serves=SERVES[task],
        )


def _placed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the execution provider that they mean, as ``device=cuda`` means one; the CPU by itself.

    A model that reads texts is quick on processors, and CUDA's libraries for it are 3 GB: nobody gets them unasked.
    """
    device, provider = settings["device"].lower(), settings["provider"]
    if device.isdecimal():  # a GPU's number
        settings, device = settings | {"gpus": (device,), "device": "cuda"}, "cuda"
    if provider == "openvino":
        return settings
    meant = {"": "cpu", "auto": "cpu", "cpu": "cpu", "cuda": "cuda"}.get(device, "")
    if provider in NVIDIA and device != "cpu" and meant:
        return settings
    if not meant or provider not in ("auto", meant):
        raise UsageError(
            f"the execution provider {provider} has no device '{settings['device']}'",
            hint="device=cuda is NVIDIA's GPU; provider=openvino has GPU, NPU and AUTO.",
        )
    return settings | {"provider": meant}


def _taken(
    request: PlanRequest, settings: dict[str, Any], needed: OnnxEstimate
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The GPU's memory that is claimed and what is made visible; writes the arena's bound into the settings."""
    if settings["provider"] not in NVIDIA:
        return {}, ()
    settings["gpu_mem_limit"] = settings["gpu_mem_limit"] or needed.weights + 2 * needed.compute + ARENA
    among = gpus.numbers(settings["gpus"])
    arenas = 2 if settings["provider"] == "tensorrt" else 1  # what TensorRT builds has memory of its own
    claim = arenas * settings["gpu_mem_limit"] + CUDA_GPU
    taken = gpus.take(request.model, request.devices, claim, among=among)
    return taken, gpus.visible(taken, gpus.names(among))


def _server(request: PlanRequest, settings: Mapping[str, Any], file: str, task: str) -> dict[str, Any]:
    """What the server program is told (``programs.onnx.settings``)."""
    same = ("provider", "inter_threads", "workers", "optimization", "spin", "max_batch", "max_batch_tokens", "queue")
    options: dict[str, Any] = {}
    if settings["provider"] in NVIDIA:
        # The arena grows by what is asked for, not by doubling; each new shape would be tried out at length.
        options = {"gpu_mem_limit": settings["gpu_mem_limit"], "arena_extend_strategy": "kSameAsRequested"}
        options |= {"cudnn_conv_algo_search": "HEURISTIC"}
    elif settings["provider"] == "openvino" and settings["device"]:
        options = {"device_type": settings["device"]}
    return {
        "name": request.model,
        "file": file,
        "task": task,
        **{name: settings[name] for name in (*same, "context", "truncate", "pooling", "normalize", "activation")},
        "provider_options": options,
        "threads": settings["threads"] or max(1, request.cpus // settings["workers"]),
        "delay": settings["max_delay_ms"] / 1000,
        "max_body": settings["max_body_mb"] * MIB,
        "max_tensors": settings["max_tensor_mb"] * MIB,
    }


# --- the model --------------------------------------------------------------------------------------------------------


def _graphs(files: tuple[ModelFile, ...]) -> list[str]:
    return sorted(f.name for f in files if f.role == "weights" and f.format == "onnx")


def _file(files: tuple[ModelFile, ...], wanted: str) -> str:
    """Of several graphs the one that is asked for or has the usual name; "" when there is none of that name."""
    graphs = _graphs(files)
    if wanted:
        return wanted if wanted in graphs else ""
    usual = ("model.onnx", "onnx/model.onnx", "model_quantized.onnx", "onnx/model_quantized.onnx")
    return next((name for name in usual if name in graphs), graphs[0] if graphs else "")


def _chosen(request: PlanRequest, wanted: str) -> str:
    if found := _file(request.files, wanted):
        return found
    raise UsageError(
        f"the model '{request.model}' has no graph '{wanted}'", hint=f"It has: {', '.join(_graphs(request.files))}."
    )


def _ports(metadata: Mapping[str, Any], file: str, side: str) -> list[dict[str, Any]]:
    """The inputs or outputs of one of the model's graphs."""
    graphs: Mapping[str, Any] = metadata.get("graphs") or {}
    return (graphs.get(file) or metadata).get(side) or []


def _task(files: tuple[ModelFile, ...], metadata: Mapping[str, Any], file: str, wanted: str) -> str:
    """What the model is for: what is asked for, else as its class and its outputs say."""
    if wanted != "auto":
        return wanted
    inputs = {str(port["name"]) for port in _ports(metadata, file, "inputs")}
    words = any(f.name.rpartition("/")[2] == "tokenizer.json" for f in files)
    made = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
    if not words or "input_ids" not in inputs or inputs - made:
        return "tensors"
    outputs = _ports(metadata, file, "outputs")
    shape = list(outputs[0].get("shape") or ()) if outputs else []
    kind = str(metadata.get("class") or "")
    if "TokenClassification" in kind:
        return "tokens"
    if "SequenceClassification" in kind:
        return "rerank" if shape[-1:] == [1] else "classify"
    return _by_outputs({str(port["name"]) for port in outputs}, shape)


def _by_outputs(names: set[str], shape: list[Any]) -> str:
    if names & {"last_hidden_state", "sentence_embedding", "sentence_embeddings", "token_embeddings"}:
        return "embeddings"
    if "logits" in names and len(shape) == 2:
        return "rerank" if shape[-1] == 1 else "classify"
    return "tensors"


def _context(request: PlanRequest, asked: int) -> int:
    """Tokens of one text."""
    own = request.metadata.get("context_length")
    most = own if isinstance(own, int) and own > 0 else SEQUENCE
    return min(asked, most) if asked else most


def _longest(request: PlanRequest, settings: Mapping[str, Any], file: str) -> int:
    """Tokens of one row of a model that is given as tensors what a tokenizer makes; 0: it is none."""
    words = any(port["name"] == "input_ids" for port in _ports(request.metadata, file, "inputs"))
    return _context(request, settings["context"]) if words else 0


def _estimate(request: PlanRequest, settings: Mapping[str, Any], file: str, context: int) -> OnnxEstimate:
    words = sum(f.size for f in request.files if f.name.rpartition("/")[2] == "tokenizer.json")
    tokens = max(context, min(settings["max_batch_tokens"], settings["max_batch"] * context))
    fixed = sum(map(_fixed, _ports(request.metadata, file, "inputs")))
    return estimate_onnx(
        request.metadata,
        tokens=tokens,
        sequence=context,
        workers=settings["workers"],
        vocabulary=words,
        file=file,
        fused=settings["optimization"] in ("all", "extended"),
        inputs=max(settings["max_tensor_mb"] * MIB, fixed),
    )


def _fixed(port: Mapping[str, Any]) -> int:
    """Bytes of one row of an input whose shape nobody can choose; 0: whoever asks chooses it."""
    shape: list[Any] = list(port.get("shape") or ())
    rows = shape[0] if shape and isinstance(shape[0], int) and shape[0] > 0 else 1
    if not all(isinstance(extent, int) and extent > 0 for extent in shape[1:]):
        return 0
    bits = str(port.get("type") or "").lstrip("abcdefghijklmnopqrstuvwxyz")
    return rows * math.prod(shape[1:]) * (int(bits) if bits.isdecimal() else 64) // 8
