"""The TensorRT-LLM engine: how trtllm-serve serves a model, and what is built for a GPU before; starts nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pierhead.config import Settings
from pierhead.engines import gpu_share, gpus, serving
from pierhead.engines.base import EngineFacts, ImageRecipe, LaunchSpec, Limits, Plan, PlanRequest, Readiness
from pierhead.engines.bridge import ENTRY, bridged, recipe_file
from pierhead.engines.builds import Build
from pierhead.engines.gpu_share import Wanted
from pierhead.engines.setting_table import Setting, Table
from pierhead.formats.safetensors_gpu import Split
from pierhead.store.model import ModelFile

MIB = 1 << 20
IMAGE = "nvcr.io/nvidia/tensorrt-llm/release"
RELEASE = "1.0.0"
HOST = 4096 * MIB  # of this machine's own memory: CUDA, Python and what is on its way to the GPU
PARALLEL = 64  # requests at a time where nobody says
_RANK = re.compile(r"rank\d+\.(engine|safetensors)$")

FACTS = EngineFacts(
    name="tensorrtllm",
    title="TensorRT-LLM",
    formats=("safetensors", "tensorrt"),
    serves=("chat", "completions"),
    accelerators=("cuda",),
    platforms=("linux/amd64", "linux/arm64"),
    common=("context",),
    parallel=0,
    metrics_path="/prometheus/metrics",
    untested="everything that runs on a GPU: plans, keys and the running of builds are tested, trtllm-serve is not",
    never_run=True,
)


class TensorRtLlm:
    """Serves Hugging Face folders, TensorRT-LLM's checkpoints and its engines."""

    name = FACTS.name
    facts = FACTS

    def __init__(self, max_context: int = 8192) -> None:
        self._max_context = max_context

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether there is a config.json beside safetensors, or beside engines of TensorRT-LLM's naming."""
        return bool(_kind(files)) and any(f.name == "config.json" for f in files)

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``."""
        return ("chat", "completions")

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings in canonical form; UsageError names an unknown one with its closest match."""
        return _TABLE.canonical(settings)

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        settings = self.validate(request.settings)
        kind = _kind(request.files)
        needed = HOST + max((f.size for f in request.files if f.role == "weights"), default=0)
        if request.free_memory and needed > request.free_memory:
            parts = {"of this machine's memory beside the GPU's": needed}
            raise serving.too_large(request.model, parts, request.free_memory, hint="Stop another model.")
        release = str(settings.get("release", RELEASE))
        devices, settings = _take(request, settings, kind, self._max_context)
        build = _build(settings, release) if kind == "checkpoint" else None
        place = "$(BUILT)" if build is not None else "$(MODEL_DIR)"
        notes = ("TensorRT-LLM needs an NVIDIA GPU; no machine of the project could try it",)
        spec = LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=bridged(*_serve(place, kind, settings), health="/health"),
            model_dir=str(request.model_dir),
            entry=str(ENTRY),
            image=ImageRecipe(self.name, f"{IMAGE}:{release}", (), (recipe_file(),)),
            limits=Limits(memory=needed * 5 // 4 + 512 * MIB, pids=8192),
            readiness=Readiness("/health", 3600.0),
            devices=gpus.visible(devices, gpus.names(settings.get("gpus", ("all",)))),
            shm_size=int(settings.get("shm_mib", 4096)) * MIB,
            tmp_size=4096 * MIB,
            ulimits={"memlock": -1, "stack": 64 * MIB},
            env={**serving.ENV, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            build=build,
            serves=FACTS.serves,
        )
        return Plan(spec=spec, context=int(settings.get("context", 0)), memory=needed, devices=devices, notes=notes)


def _take(
    request: PlanRequest, settings: dict[str, Any], kind: str, longest: int
) -> tuple[dict[str, int], dict[str, Any]]:
    """The GPUs' memory that is claimed, and the settings with those that keep it to that.

    Its cache is a share of what is free once the weights are there. Of engines and checkpoints nobody knows the shape:
    with them it has most of each GPU.
    """
    among = settings.get("gpus", ("all",))
    total, fraction = gpus.largest(request.devices, among), settings.get("kv_cache_free_gpu_memory_fraction")
    wanted = Wanted(
        models=[request.metadata],
        parallel=settings.get("parallel", PARALLEL),
        limit=min(int(request.metadata.get("context_length") or 0) or longest, longest),
        batch=settings.get("max_num_tokens", 8192),
        context=settings.get("context", 0),
        split=Split(settings.get("tp_size", 1), settings.get("pp_size", 1)),
        gpus=among,
    )
    if not total or fraction is not None or kind != "hf":
        share = fraction if fraction is not None else gpu_share.MOST
        return gpu_share.claim(request.model, request.devices, int(total * share), wanted), settings
    found = gpu_share.share(wanted, request.devices)
    devices = gpu_share.claim(request.model, request.devices, found.need, wanted)
    left = min(total, gpus.emptiest(request.devices, among, wanted.split.gpus)) - wanted.fixed
    usual = {"parallel": wanted.parallel, "max_num_tokens": wanted.batch, "context": found.context}
    part = round(min(gpu_share.MOST, max(found.cache / max(left, 1), 0.001)), 4)
    return devices, {**usual, **settings, "kv_cache_free_gpu_memory_fraction": part}


def _kind(files: tuple[ModelFile, ...]) -> str:
    """``engine`` and ``checkpoint`` are TensorRT-LLM's own, ``hf`` a folder as Hugging Face has it."""
    ranks = {found[1] for f in files if (found := _RANK.match(f.name))}
    if "engine" in ranks:
        return "engine"
    if "safetensors" in ranks:
        return "checkpoint"
    weights = any(f.role == "weights" and f.format == "safetensors" and "/" not in f.name for f in files)
    return "hf" if weights else ""


def _serve(place: str, kind: str, settings: Mapping[str, Any]) -> list[str]:
    """The command line of trtllm-serve."""
    backend = "pytorch" if kind == "hf" else "trt"
    words = ["trtllm-serve", "serve", place, "--host", "127.0.0.1", "--port", "$(PORT)", "--backend", backend]
    if kind != "hf":
        words += ["--tokenizer", "$(MODEL_DIR)"]
    for name, flag in _FLAGS.items():
        if name in settings:
            words += [flag, str(settings[name])]
    return words


def _build(settings: Mapping[str, Any], release: str) -> Build:
    """The job that makes an engine of a checkpoint for the GPUs of this machine."""
    told = {flag: str(settings[name]) for name, flag in _BUILD_FLAGS.items() if name in settings}
    words = [word for pair in sorted(told.items()) for word in pair]
    argv = ("trtllm-build", "--checkpoint_dir", "$(MODEL_DIR)", "--output_dir", "$(OUTPUT)", *words)
    return Build(tool="trtllm-build", version=release, argv=argv, settings=told)


# --- settings -----------------------------------------------------------------------------------------------------

_MOST = 1 << 30
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_SETTINGS = {
    "context": Setting(int, 0, 1, _MOST),
    "parallel": Setting(int, 0, 1, _MOST),
    "max_num_tokens": Setting(int, 0, 1, _MOST),
    "tp_size": Setting(int, 1, 1, 1024),
    "pp_size": Setting(int, 1, 1, 1024),
    "ep_size": Setting(int, 1, 1, 1024),
    "kv_cache_free_gpu_memory_fraction": Setting(float, 0.9, 0.01, 1),
    "reasoning_parser": Setting(str, "", pattern=_WORD),
    "gemm_plugin": Setting(str, "", pattern=_WORD),
    "device": Setting(str, "auto", choices=("auto", "cuda")),
    "gpus": Setting(tuple, ("all",), pattern=_WORD),
    "release": Setting(str, RELEASE, pattern=_WORD),
    "shm_mib": Setting(int, 4096, 1, _MOST),
}
_ALIASES = {
    "max_seq_len": "context",
    "max_batch_size": "parallel",
    "tensor_parallel_size": "tp_size",
    "pipeline_parallel_size": "pp_size",
    "gpu_memory_fraction": "kv_cache_free_gpu_memory_fraction",
}
_TABLE = Table("the engine tensorrtllm", _SETTINGS, _ALIASES)
_FLAGS = {
    "context": "--max_seq_len",
    "parallel": "--max_batch_size",
    "max_num_tokens": "--max_num_tokens",
    "tp_size": "--tp_size",
    "pp_size": "--pp_size",
    "ep_size": "--ep_size",
    "kv_cache_free_gpu_memory_fraction": "--kv_cache_free_gpu_memory_fraction",
    "reasoning_parser": "--reasoning_parser",
}
_BUILD_FLAGS = {
    "context": "--max_seq_len",
    "parallel": "--max_batch_size",
    "max_num_tokens": "--max_num_tokens",
    "gemm_plugin": "--gemm_plugin",
}


def make(settings: Settings) -> TensorRtLlm:
    """The engine as this installation has it."""
    return TensorRtLlm(settings.engine.max_context)
