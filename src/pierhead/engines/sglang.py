"""SGLang as an engine: safetensors models as launch plans for CUDA, with its image or its wheels; pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pierhead.config import Settings
from pierhead.engines import bridge, gpu_share, gpus, serving
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
from pierhead.engines.flags import Flag, Flags
from pierhead.engines.gpu_share import Wanted
from pierhead.engines.huggingface import adapters, is_model, kind, say
from pierhead.errors import UsageError
from pierhead.formats.safetensors_estimate import weights
from pierhead.formats.safetensors_gpu import Split
from pierhead.store.model import ModelFile

VERSION = "0.5.23"
IMAGE = f"docker.io/lmsysorg/sglang:v{VERSION}"
WHEELS = Environment((f"sglang=={VERSION}",))
MIB = 1 << 20
HOST = 6 << 30  # of the machine's own memory; the weights are on the GPU, and nothing here could measure it
_TOKENS = ("tokenize", "detokenize")

OWN = {
    "context": Flag("count"),
    "parallel": Flag("count"),
    "device": Flag("text", ("auto", "cuda")),
    "gpus": Flag("text"),  # those it may use: all, 0, 0,1
    "lora": Flag("text", many=True),  # NAME=FOLDER inside the model
}
ALIASES = {
    **dict.fromkeys(("context_length", "max_model_len", "ctx_size", "c"), "context"),
    **dict.fromkeys(("max_running_requests", "max_num_seqs", "slots", "np"), "parallel"),
    **dict.fromkeys(("cache_type", "cache_type_k", "kv_cache"), "kv_cache_dtype"),
    "lora_paths": "lora",
    "cache_tokens": "max_total_tokens",
    "gpu_memory_utilization": "mem_fraction_static",
    "tensor_parallel_size": "tp_size",
}
_SEAM = "Pierhead sets it itself"
_SANDBOX = "it would reach out of the sandbox"
_GATEWAY = "secrets and TLS belong to the gateway"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("model_path", "host", "port", "served_model_name", "tokenizer_path", "enable_metrics"), _SEAM),
    **dict.fromkeys(("is_embedding", "config", "smg_grpc_mode", "grpc_mode", "encoder_only"), _SEAM),
    **dict.fromkeys(("api_key", "admin_api_key", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs"), _GATEWAY),
    **dict.fromkeys(("dist_init_addr", "nnodes", "node_rank", "download_dir", "revision"), _SANDBOX),
    **dict.fromkeys(("disaggregation_mode", "disaggregation_bootstrap_port", "disaggregation_ib_device"), _SANDBOX),
    **dict.fromkeys(("encoder_urls", "encoder_register_urls", "grpc_port", "nccl_port", "gated_launch_port"), _SANDBOX),
    **dict.fromkeys(("remote_instance_weight_loader_seed_instance_ip", "export_metrics_to_file_dir"), _SANDBOX),
    **dict.fromkeys(("fastapi_root_path", "ssl_keyfile_password", "enable_ssl_refresh"), _GATEWAY),
    **dict.fromkeys(("otlp_traces_endpoint", "file_storage_path", "crash_dump_folder", "tool_server"), _SANDBOX),
}
FLAGS = Flags(Path(__file__).with_name("sglang_flags.json"), OWN, ALIASES, REFUSED)
FACTS = EngineFacts(
    name="sglang",
    title="SGLang",
    formats=("safetensors",),
    serves=("chat", "completions", "embeddings", "rerank", "score", "classify", *_TOKENS),
    accelerators=("cuda",),
    common=("context", "parallel"),
    parallel=16,
    metrics={
        "running": "sglang:num_running_reqs",
        "waiting": "sglang:num_queue_reqs",
        "cache_usage": "sglang:token_usage",
        "prompt_tokens": "sglang:prompt_tokens_total",
        "generated_tokens": "sglang:generation_tokens_total",
    },
    lora="runtime",
    lora_inside=True,
    sleep=True,
    speculative=True,
    untested="All of it: SGLang has wheels and images for GPUs only, and this project ran on none.",
    never_run=True,
)


class SgLang:
    """Serves models in Hugging Face's layout through SGLang's own server."""

    name = FACTS.name
    facts = FACTS
    environment = WHEELS

    def __init__(self, max_context: int = 8192) -> None:
        self._max_context = max_context

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether there are safetensors weights of one model."""
        return is_model(files)

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``."""
        return say(metadata)

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings under SGLang's own names; UsageError names an unknown one with its closest match."""
        return FLAGS.canonical(settings)

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        if request.free_memory and request.free_memory < HOST:
            raise serving.too_large(
                request.model, {"beside the GPU's memory": HOST}, request.free_memory, hint="Stop another model."
            )
        settings = FLAGS.canonical(request.settings)
        trained = int(request.metadata.get("context_length") or 0) or self._max_context
        limit = min(trained, self._max_context)
        settings.pop("device", None)
        among = gpus.numbers(settings.pop("gpus", "all"))
        taken = _take(request, settings, among, limit)
        context = settings.pop("context", 0) or taken.context
        lora = _lora(request, settings.pop("lora", ()))
        flags: dict[str, Any] = {
            "served_model_name": request.model,
            "context_length": context,
            "max_running_requests": settings.pop("parallel", 0) or FACTS.parallel,
            "enable_metrics": True,
            "is_embedding": kind(request.metadata) not in ("chat", "write"),
            **({"enable_lora": True} if lora else {}),
            **taken.flags,
            **settings,
        }
        place = ("--model-path=$(MODEL_DIR)", "--host=127.0.0.1", "--port=$(PORT)")
        server = ("$(PYTHON)", "-m", "sglang.launch_server", *place, *FLAGS.argv(flags), *lora)
        spec = LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=bridge.bridged(*server, health="/health"),
            env={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"},
            model_dir=str(request.model_dir),
            entry=str(bridge.ENTRY),
            environment=WHEELS,
            image=ImageRecipe(self.name, IMAGE, (), (bridge.recipe_file(),)),
            limits=Limits(memory=HOST * 2, pids=8192),
            readiness=Readiness(timeout=1800.0),
            devices=gpus.visible(taken.devices, gpus.names(among)),
            shm_size=4096 * MIB,
            tmp_size=2048 * MIB,
            serves=_work(request.metadata),
        )
        return Plan(spec=spec, context=context, memory=HOST, devices=taken.devices)


class _Taken(NamedTuple):
    devices: dict[str, int]
    context: int
    flags: dict[str, Any]


def _take(request: PlanRequest, settings: Mapping[str, Any], among: tuple[str, ...], limit: int) -> _Taken:
    """The GPUs' memory that is claimed, and the size of the cache that keeps it to that.

    SGLang's own share (``mem_fraction_static``) is of what is free, for weights and cache; the rest it works with.
    """
    dtype = str(settings.get("kv_cache_dtype", "auto"))
    wanted = Wanted(
        models=[request.metadata],
        parallel=settings.get("parallel", 0) or FACTS.parallel,
        limit=limit,
        batch=int(settings.get("chunked_prefill_size", 0)) or gpu_share.batch(request.devices, among),
        context=settings.get("context", 0),
        cached=_count(str(settings.get("max_total_tokens", "0"))),
        cache_bytes=0.6 if "4" in dtype else 1.0 if "8" in dtype else 2.0,
        full=settings.get("dtype") in ("float32", "float"),
        extra_weights=sum(f.size for f in request.files if f.role in ("lora", "draft")),
        sees="vision" in say(request.metadata),
        split=Split(int(settings.get("tp_size", 1)), int(settings.get("pp_size", 1))),
        copies=1 if settings.get("enable_dp_attention") else max(1, int(settings.get("dp_size", 1))),
        gpus=among,
    )
    total = gpus.largest(request.devices, among)
    if not total:
        return _Taken(gpu_share.claim(request.model, request.devices, 0, wanted), limit, {})
    found, fraction = gpu_share.share(wanted, request.devices), settings.get("mem_fraction_static")
    need, flags = found.need, {"max_total_tokens": str(found.cached)}
    if fraction is not None:
        work = wanted.fixed - weights(request.metadata, wanted.full) // wanted.split.gpus
        need, flags = min(total, int(total * float(fraction)) + max(work, 0)), {}
    return _Taken(gpu_share.claim(request.model, request.devices, need, wanted), found.context, flags)


def _count(text: str) -> int:
    """A number of tokens; 0 where SGLang chooses."""
    return int(text) if text.isdecimal() else 0


def _lora(request: PlanRequest, asked: Any) -> tuple[str, ...]:
    """The flag for adapters: those that come with the model, and others of its folder."""
    pairs = [str(one).partition("=") for one in asked]
    folders = {**adapters(request.files), **{name: folder or name for name, _, folder in pairs}}
    for folder in folders.values():
        if not any(f.name.startswith(f"{folder}/") for f in request.files):
            raise UsageError(f"the model '{request.model}' has no folder '{folder}'", hint="Name one inside the model.")
    words = (f"{name}={folder}".replace("$(", "$$(") for name, folder in folders.items())
    listed = [f"{name}=$(MODEL_DIR)/{folder}" for name, _, folder in (word.partition("=") for word in words)]
    return ("--lora-paths", *listed) if listed else ()


def _work(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The operations that the model is for."""
    return {
        "chat": ("chat", "completions", *_TOKENS),
        "write": ("completions", *_TOKENS),
        "embed": ("embeddings", *_TOKENS),
        "classify": ("classify", *_TOKENS),
        "rank": ("rerank", "score", *_TOKENS),
    }[kind(metadata)]


def make(settings: Settings) -> SgLang:
    """The engine as this installation has it."""
    return SgLang(settings.engine.max_context)
