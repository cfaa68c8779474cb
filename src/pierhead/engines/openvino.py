"""OpenVINO GenAI as an engine: models in OpenVINO's own format as launch plans, for CPUs and Intel's GPUs; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pierhead.config import Settings
from pierhead.engines import serving
from pierhead.engines.base import EngineFacts, Environment, ImageRecipe, LaunchSpec, Limits, Plan, PlanRequest
from pierhead.engines.flags import Flag, Flags
from pierhead.engines.huggingface import kind
from pierhead.engines.setting_table import spelled
from pierhead.errors import OutOfMemory, UsageError
from pierhead.formats import openvino_estimate
from pierhead.formats.estimate import Estimate
from pierhead.formats.openvino import MODEL
from pierhead.store.model import ModelFile

# All that serving needs; what they would bring besides is OpenVINO's telemetry.
PINS = (
    *("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "numpy==2.4.6"),
    *("starlette==1.10.0", "uvicorn==0.54.0", "anyio==4.16.0", "click==8.5.1", "h11==0.16.0", "idna==3.20"),
    "typing-extensions==4.16.0",
)
WHEELS = Environment(PINS, dependencies=False)
PARALLEL = 4
ROWS = 32  # texts that are read at a time
READ = 4096  # tokens that are read at a time, padding included
TEXT = 512  # tokens of a text where the model does not say how many it reads
SMALLEST = 512  # tokens: no default context is chosen below this
MIB = 1 << 20
_TEXTS = ("completions", "tokenize", "detokenize")
_READS: dict[str, tuple[str, ...]] = {"embed": ("embeddings", "score"), "rank": ("rerank", "score")}
_CACHES = {"q8_0": "u8", "q4_0": "u4"}  # llama.cpp's words for what is much the same
FLAGS = Flags(
    None,
    {
        "context": Flag("count"),
        "parallel": Flag("count"),
        "threads": Flag("count"),
        "device": Flag("text", ("cpu", "gpu")),
        "kv_cache_precision": Flag("text", tuple(openvino_estimate.PRECISIONS)),
        "max_num_batched_tokens": Flag("count"),
        "enable_prefix_caching": Flag("yesno"),
        "task": Flag("text", ("auto", "write", *_READS)),
        "max_batch": Flag("count"),
        "pooling": Flag("text", ("auto", "mean", "cls", "last")),
        "normalize": Flag("yesno"),
        "truncate": Flag("yesno"),
        "properties": Flag("json"),  # of the device, in OpenVINO's own words
    },
    {
        **dict.fromkeys(("ctx_size", "c", "max_model_len"), "context"),
        **dict.fromkeys(("np", "slots", "max_num_seqs"), "parallel"),
        **dict.fromkeys(("t", "inference_num_threads"), "threads"),
        **dict.fromkeys(("cache_type", "kv_cache_dtype", "cache_type_k", "kv_cache_type"), "kv_cache_precision"),
        **dict.fromkeys(("batch", "batch_size", "max_batch_tokens"), "max_num_batched_tokens"),
        "normalise": "normalize",
        "prefix_caching": "enable_prefix_caching",
    },
    {},
)
FACTS = EngineFacts(
    name="openvino",
    title="OpenVINO GenAI",
    formats=("openvino",),
    serves=("chat", *_TEXTS, "embeddings", "rerank", "score"),
    common=("context", "parallel", "threads", "kv_cache_type", "pooling", "normalize"),
    accelerators=("cpu", "openvino"),
    platforms=("linux/amd64",),
    parallel=PARALLEL,
    metrics={
        "running": "openvino_requests_running",
        "waiting": "openvino_requests_waiting",
        "cache_usage": "openvino_cache_usage_ratio",
        "prompt_tokens": "openvino_prompt_tokens_total",
        "generated_tokens": "openvino_generated_tokens_total",
    },
    untested="Intel's GPUs: device=gpu was never run by this project.",
)


class OpenVino:
    """Serves models in OpenVINO's format: those that write with continuous batching, those that read in batches."""

    name = FACTS.name
    facts = FACTS
    environment = WHEELS

    def __init__(self, base_image: str = "", max_context: int = 8192) -> None:
        self._base_image = base_image
        self._max_context = max_context

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether there is the graph of a model that writes or reads text."""
        return any(f.name == MODEL and f.role == "weights" for f in files)

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``; tools would need a parser that this engine does not have."""
        if (reads := _READS.get(_task(metadata, files))) is not None:
            return reads[:1]
        return ("chat", "completions") if _chats(metadata) else ("completions",)

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings in canonical form; UsageError names an unknown one with its closest match."""
        words = {k: _CACHES.get(str(v).lower(), v) if spelled(k) == "kv_cache_type" else v for k, v in settings.items()}
        return FLAGS.canonical(words)

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        settings = self.validate(request.settings)
        asked = settings.get("task", "auto")
        task = asked if asked != "auto" else _task(request.metadata, request.files)
        if task == "classify":
            raise UsageError(
                f"'{request.model}' is a classifier, which OpenVINO GenAI does not serve",
                hint="Export it to ONNX: the engine onnx classifies.",
            )
        plan = self._writing if task == "write" else self._reading
        told, context, needed = plan(request, settings, task)
        if request.free_memory and needed.total > request.free_memory:
            raise _too_large(request, needed, context)
        return Plan(spec=self._spec(request, told, needed), context=context, memory=needed.total)

    def _writing(
        self, request: PlanRequest, settings: Mapping[str, Any], task: str
    ) -> tuple[dict[str, Any], int, Estimate]:
        """What the server is told, the context, and the memory of a model that writes."""
        parallel = settings.get("parallel") or PARALLEL
        sizing: dict[str, Any] = {
            "parallel": parallel,
            "precision": settings.get("kv_cache_precision", "u8"),
            "batch": settings.get("max_num_batched_tokens") or openvino_estimate.BATCH,
        }
        asked = serving.within(settings.get("context", 0), request.metadata)
        context = self._context(request, asked, sizing)
        needed = openvino_estimate.estimate(request.metadata, context=context, **sizing)
        scheduler = {
            "max_num_seqs": parallel,
            "max_num_batched_tokens": sizing["batch"],
            "num_kv_blocks": openvino_estimate.blocks(context, parallel),
            "enable_prefix_caching": settings.get("enable_prefix_caching", True),
        }
        told = _told(request, settings, task, context, {"KV_CACHE_PRECISION": sizing["precision"]})
        return told | {"scheduler": scheduler}, context, needed

    def _reading(
        self, request: PlanRequest, settings: Mapping[str, Any], task: str
    ) -> tuple[dict[str, Any], int, Estimate]:
        """The same of a model that makes vectors or ranks; its context is that of one text."""
        trained = int(request.metadata.get("context_length") or 0) or TEXT
        context = min(settings.get("context") or trained, trained)
        rows = settings.get("max_batch") or ROWS
        tokens = max(settings.get("max_num_batched_tokens") or READ, context)
        needed = openvino_estimate.estimate_reading(request.metadata, tokens=min(tokens, rows * context), text=context)
        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else vectors depend on which processor made them
        told = _told(request, settings, task, context, exact) | {
            "max_batch": rows,
            "max_batch_tokens": tokens,
            "pooling": settings.get("pooling", "auto"),
            "normalize": settings.get("normalize"),
            "truncate": settings.get("truncate", False),
        }
        return told, context, needed

    def _context(self, request: PlanRequest, asked: int, sizing: Mapping[str, Any]) -> int:
        if asked:
            return asked
        limit = min(int(request.metadata.get("context_length") or 0) or self._max_context, self._max_context)
        if not request.free_memory:
            return limit
        fits = openvino_estimate.fit_context(request.metadata, free=request.free_memory, limit=limit, **sizing)
        return max(fits, min(SMALLEST, limit))  # the refusal of what does not fit has the numbers

    def _spec(self, request: PlanRequest, told: Mapping[str, Any], needed: Estimate) -> LaunchSpec:
        return LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=serving.command(told, "openvino"),
            env={"OPENVINO_TELEMETRY": "0", **serving.ENV},
            model_dir=str(request.model_dir),
            entry=str(serving.PROGRAMS),
            environment=WHEELS,
            image=ImageRecipe(self.name, self._base_image, PINS, serving.program_files("openvino")),
            limits=Limits(memory=needed.total * 5 // 4 + 512 * MIB, pids=2048),
            devices=("intel.com/gpu=all",) if told["device"] == "GPU" else (),
            serves=_READS.get(told["task"]) or (("chat", *_TEXTS) if _chats(request.metadata) else _TEXTS),
        )


def _told(
    request: PlanRequest, settings: Mapping[str, Any], task: str, context: int, usual: Mapping[str, Any]
) -> dict[str, Any]:
    """What every server is told."""
    device = settings.get("device", "cpu")
    properties: dict[str, Any] = {**usual, **settings.get("properties", {})}
    if device == "cpu":
        properties["INFERENCE_NUM_THREADS"] = settings.get("threads") or max(1, request.cpus)
    return {
        "model": request.model,
        "task": task,
        "context": context,
        "device": device.upper(),
        "properties": properties,
    }


def _task(metadata: Mapping[str, Any], files: tuple[ModelFile, ...]) -> str:
    """``write``, ``embed``, ``rank`` or ``classify``: a graph that keeps a cache writes, of others the class tells."""
    if metadata.get("layers"):
        return "write"
    if kind(metadata) in ("rank", "classify"):
        return kind(metadata)
    reads = metadata.get("class") or any(f.name == "1_Pooling/config.json" for f in files)
    return "embed" if reads else "write"


def _too_large(request: PlanRequest, needed: Estimate, context: int) -> OutOfMemory:
    parts = {"weights": needed.weights, "KV cache": needed.kv_cache, "work": needed.compute}
    return serving.too_large(
        request.model,
        {**{name: size for name, size in parts.items() if size}, "OpenVINO itself": needed.overhead},
        request.free_memory,
        hint="Try a smaller --context, fewer --parallel, --option kv-cache-precision=u4, or stop a model.",
        context=context,
        **needed.to_dict(),
    )


def _chats(metadata: Mapping[str, Any]) -> bool:
    return bool(str(metadata.get("chat_template") or "").strip())


def make(settings: Settings) -> OpenVino:
    """The engine as this installation has it."""
    return OpenVino(settings.runtime.base_image, settings.engine.max_context)
