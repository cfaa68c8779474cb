"""vLLM as an engine: safetensors models as launch plans, on the CPU with its wheels or on CUDA with its image; pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pierhead.config import Settings
from pierhead.engines import gpus, serving, vllm_cuda
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
from pierhead.engines.huggingface import is_model, kind, say
from pierhead.engines.setting_table import spelled
from pierhead.engines.vllm_beside import Companions, companions
from pierhead.engines.vllm_params import FLAGS, PARALLEL, Wishes
from pierhead.errors import OutOfMemory
from pierhead.formats.estimate import Estimate
from pierhead.formats.safetensors_estimate import cache_size, estimate, fit_context, weights
from pierhead.store.model import ModelFile

VERSION = "0.32.0"
IMAGE = f"docker.io/vllm/vllm-openai:v{VERSION}"
# Exact and all of them, so that nothing is installed that serving does not need (1 GB of Triton, for one).
PINS = tuple(Path(__file__).with_name("vllm_pins.txt").read_text(encoding="utf-8").split())
WHEELS = Environment(PINS, dependencies=False, torch="cpu")
CUDA_WHEELS = Environment((f"vllm=={VERSION}",))
ENTRY = Path(__file__).with_name("vllm_entry.py")
SMALLEST = 512  # tokens: no default context is chosen below this
MIB = 1 << 20
CUDA_HOST = 3584 * MIB  # of the machine's own memory, when the weights are on the GPU; on an H200 it was 2,915 MiB
_COMMON = ("context", "parallel", "threads", "kv_cache_type")
_WRITES = ("chat", "completions", "count-tokens")
_TOKENS = ("tokenize", "detokenize")
_CACHES = {"f16": "float16", "bf16": "bfloat16"}  # llama.cpp's words for what is the same
_ON_CUDA = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it is compiled at the start, by a compiler that need not be there
    "FLASHINFER_WORKSPACE_BASE": "/tmp",  # noqa: S108
    "TRITON_CACHE_DIR": "/tmp/triton",  # noqa: S108
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",  # noqa: S108
    "CUDA_CACHE_PATH": "/tmp/cuda",  # noqa: S108
}

FACTS = EngineFacts(
    name="vllm",
    title="vLLM",
    formats=("safetensors",),
    serves=(*_WRITES, "embeddings", "rerank", "score", "vllm-classify", *_TOKENS),
    accelerators=("cpu", "cuda"),
    metrics={
        "running": "vllm:num_requests_running",
        "waiting": "vllm:num_requests_waiting",
        "cache_usage": "vllm:kv_cache_usage_perc",
        "prompt_tokens": "vllm:prompt_tokens_total",
        "generated_tokens": "vllm:generation_tokens_total",
    },
    common=(*_COMMON, "pooling", "normalize", "reasoning_parser", "tool_parser", "draft", "draft_tokens"),
    parallel=PARALLEL,
    lora="runtime",
    sleep=True,  # on CUDA only
    speculative=True,
    untested="The image for CUDA. As a process 0.26 was run on one H200, not the version that is pinned.",
)


class Vllm:
    """Serves models in Hugging Face's layout through vLLM's own server."""

    name = FACTS.name
    facts = FACTS
    environment = WHEELS

    def __init__(self, base_image: str = "", max_context: int = 8192) -> None:
        self._base_image = base_image
        self._max_context = max_context

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether there are safetensors weights of one model."""
        return is_model(files)

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``."""
        return say(metadata)

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings under vLLM's own names; UsageError names an unknown one with its closest match."""
        words = {k: _CACHES.get(str(v).lower(), v) if spelled(k) == "kv_cache_type" else v for k, v in settings.items()}
        return FLAGS.canonical(words)

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        wishes = Wishes.of(request.settings, request.cpus, request.devices)
        trained = int(request.metadata.get("context_length") or 0) or self._max_context
        limit = min(trained, self._max_context)
        beside = companions(request, wishes, wishes.context or limit)
        if wishes.device == "cuda":
            needed, taken = _on_host(request, wishes, beside), vllm_cuda.take(request, wishes, beside, limit)
        else:
            needed, taken = self._on_cpu(request, wishes, beside, limit)
        if request.free_memory and needed.total > request.free_memory:
            raise _too_large(request.model, needed, taken.context, request.free_memory)
        flags = {**_usual(request, wishes, taken), **wishes.flags, **beside.flags}
        if any(word.startswith("--speculative-config") for word in beside.words):
            flags.pop("speculative_config", None)
        return Plan(
            spec=self._spec(request, wishes, flags, needed, beside, taken.devices),
            context=taken.context,
            memory=needed.total,
            devices=taken.devices,
            parallel=wishes.parallel if wishes.device == "cuda" else 0,
        )

    def _on_cpu(
        self, request: PlanRequest, wishes: Wishes, beside: Companions, limit: int
    ) -> tuple[Estimate, vllm_cuda.Taken]:
        """What is needed of the machine's memory, and the context."""
        sizing: dict[str, Any] = {
            "parallel": wishes.parallel,
            "cache_bytes": wishes.cache_bytes,
            "full": wishes.full,
            "extra_weights": sum(f.size for f in request.files if f.role in ("lora", "draft")) + beside.memory,
        }
        context = self._context(request, wishes, sizing, limit)
        size = cache_size(request.metadata, context=context, parallel=wishes.parallel, cache_bytes=wishes.cache_bytes)
        flags = {
            "kv_cache_memory_bytes": str(max(size + beside.cache, MIB)),  # without, it wants most of the memory
            "enforce_eager": True,  # compiling needs a C++ compiler, and minutes at each start
        }
        return estimate(request.metadata, context=context, **sizing), vllm_cuda.Taken({}, context, flags)

    def _context(self, request: PlanRequest, wishes: Wishes, sizing: Mapping[str, Any], limit: int) -> int:
        if wishes.context or not request.free_memory:
            return wishes.context or limit
        fits = fit_context(request.metadata, free=request.free_memory, limit=limit, **sizing)
        smallest = min(SMALLEST, limit)
        if fits < smallest:
            if estimate(request.metadata, context=smallest, **sizing).total > request.free_memory:
                needed = estimate(request.metadata, context=smallest, **sizing)
                raise _too_large(request.model, needed, smallest, request.free_memory)
            return smallest
        return fits

    def _spec(
        self,
        request: PlanRequest,
        wishes: Wishes,
        flags: Mapping[str, Any],
        needed: Estimate,
        beside: Companions,
        devices: Mapping[str, int],
    ) -> LaunchSpec:
        cuda = wishes.device == "cuda"
        files = serving.files(ENTRY)
        places = ("--socket", "$(SOCKET)", "--work", beside.work or "$(MODEL_DIR)", "--", "--model=$(MODEL_DIR)")
        return LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=("$(PYTHON)", "-I", "$(ENTRY)", *places, *FLAGS.argv(flags), *beside.words),
            env=_environ(wishes, flags),
            model_dir=str(request.model_dir),
            entry=str(ENTRY),
            environment=CUDA_WHEELS if cuda else WHEELS,
            image=ImageRecipe(self.name, IMAGE, (), files)
            if cuda
            else ImageRecipe(self.name, self._base_image, PINS, files, torch=WHEELS.torch),
            limits=Limits(memory=needed.total * 5 // 4 + 1024 * MIB, pids=4096),
            readiness=Readiness(timeout=900.0),
            devices=gpus.visible(devices, gpus.names(wishes.gpus)),
            shm_size=1024 * MIB,
            tmp_size=(2048 if cuda else 1024) * MIB,
            serves=_work(request.metadata),
            mounts=beside.mounts,
            adapters=beside.own,
            loading=beside.loading,
            sleep=("/sleep?level=1", "/wake_up") if flags.get("enable_sleep_mode") else (),
        )


def _on_host(request: PlanRequest, wishes: Wishes, beside: Companions) -> Estimate:
    """What the machine's own memory must have where the model is on a GPU; asleep, its weights are here as well."""
    size = weights(request.metadata, wishes.full) + beside.resident
    away = int(float(wishes.flags.get("cpu_offload_gb", 0.0)) * 1024) * MIB
    return Estimate(size if wishes.flags.get("enable_sleep_mode") else min(size, away), 0, 0, CUDA_HOST)


def _usual(request: PlanRequest, wishes: Wishes, taken: vllm_cuda.Taken) -> dict[str, Any]:
    """Flags that a user's own come after."""
    flags: dict[str, Any] = {
        "served_model_name": [request.model],
        "max_model_len": str(taken.context),
        "max_num_seqs": wishes.parallel,
        "disable_uvicorn_access_log": True,
        "shutdown_timeout": 0,
        **taken.flags,
    }
    if "tool_call_parser" in wishes.flags:
        flags["enable_auto_tool_choice"] = True
    return flags


def _environ(wishes: Wishes, flags: Mapping[str, Any]) -> dict[str, str]:
    """No network, nothing told to anybody, caches where it may write; the gateway sees to names."""
    found = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_SKIP_MODEL_NAME_VALIDATION": "1",  # a model has more names than one
        "VLLM_CACHE_ROOT": "/tmp/vllm",  # noqa: S108
        "XDG_CACHE_HOME": "/tmp/cache",  # noqa: S108
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }
    if wishes.device == "cpu":  # several engines share the cores: the system places their threads
        found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(wishes.threads)}
    else:
        found |= _ON_CUDA
    if flags.get("enable_lora"):
        found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if flags.get("enable_sleep_mode"):
        found["VLLM_SERVER_DEV_MODE"] = "1"  # else there are no routes for it
    return found


def _work(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The operations that the model is for."""
    return {
        "chat": (*_WRITES, *_TOKENS),
        "write": ("completions", *_TOKENS),
        "embed": ("embeddings", *_TOKENS),
        "classify": ("vllm-classify", *_TOKENS),
        "rank": ("rerank", "score", *_TOKENS),
    }[kind(metadata)]


def _too_large(model: str, needed: Estimate, context: int, free: int) -> OutOfMemory:
    parts = {"weights": needed.weights, "KV cache": needed.kv_cache, "compute": needed.compute}
    return serving.too_large(
        model,
        {**parts, "vLLM itself": needed.overhead},
        free,
        hint="Try a smaller --context, fewer --parallel, --option kv-cache-dtype=fp8, or stop another model.",
        context=context,
        **needed.to_dict(),
    )


def make(settings: Settings) -> Vllm:
    """The engine as this installation has it."""
    return Vllm(settings.runtime.base_image, settings.engine.max_context)
