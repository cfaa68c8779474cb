"""vLLM's settings: those that Pierhead reads itself, other words for some, and what may not be set; starts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pierhead.engines import gpus
from pierhead.engines.flags import Flag, Flags
from pierhead.engines.gpu_share import HELD

PARALLEL = 4  # requests at a time on the CPU where nobody says: it works on all of them in one step
MANY = 64  # the same on a GPU
DRIVER, CAPABILITY = 580, 7.5  # of CUDA 13, which the wheels of PyTorch and vLLM are made for
OWN = {
    "context": Flag("count"),
    "parallel": Flag("count"),
    "threads": Flag("count"),
    "device": Flag("text", ("auto", "cpu", "cuda")),
    "gpus": Flag("text"),  # those it may use: all, 0, 0,1
    "cache_tokens": Flag("count"),  # that the cache of a GPU holds, of all requests together
    "lora": Flag("text", many=True),  # NAME=FOLDER inside the model
    "enable_lora": Flag("yesno"),  # so that adapters can come later
    "draft": Flag("text"),  # another model of the store
    "draft_tokens": Flag("count"),
    "ngram": Flag("yesno"),  # drafts what followed the last words before
    "pooling": Flag("text", ("mean", "cls", "last")),
    "normalize": Flag("yesno"),
}
ALIASES = {
    **dict.fromkeys(("max_model_len", "ctx_size", "c", "n_ctx"), "context"),
    **dict.fromkeys(("max_num_seqs", "slots", "np", "n_parallel"), "parallel"),
    **dict.fromkeys(("t", "n_threads"), "threads"),
    "max_total_tokens": "cache_tokens",
    **dict.fromkeys(("cache_type", "cache_type_k", "kv_cache", "kv_cache_type"), "kv_cache_dtype"),
    "lora_modules": "lora",
    "batch": "max_num_batched_tokens",
    **dict.fromkeys(("model_draft", "md"), "draft"),
    **dict.fromkeys(("draft_max", "num_speculative_tokens"), "draft_tokens"),
    "normalise": "normalize",
    "tool_parser": "tool_call_parser",
    "quant": "quantization",
}

_SEAM = "Pierhead sets it itself"
_SANDBOX = "it would reach out of the sandbox"
_GATEWAY = "secrets, TLS and CORS belong to the gateway"
_CODE = "it names code that is not in the engine's environment"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("model", "host", "port", "uds", "served_model_name", "root_path", "headless", "grpc"), _SEAM),
    **dict.fromkeys(("config", "tokenizer", "hf_config_path", "api_server_count", "disable_log_stats"), _SEAM),
    **dict.fromkeys(("enable_auto_tool_choice", "kv_cache_memory_bytes", "response_role", "grpc_port"), _SEAM),
    **dict.fromkeys(("api_key", "hf_token", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs"), _GATEWAY),
    **dict.fromkeys(("ssl_ciphers", "enable_ssl_refresh", "allow_credentials", "allowed_origins"), _GATEWAY),
    **dict.fromkeys(("allowed_methods", "allowed_headers"), _GATEWAY),
    **dict.fromkeys(("revision", "code_revision", "tokenizer_revision", "download_dir", "tool_server"), _SANDBOX),
    **dict.fromkeys(("allowed_local_media_path", "allowed_media_domains", "otlp_traces_endpoint"), _SANDBOX),
    **dict.fromkeys(("collect_detailed_traces", "master_addr", "master_port", "nnodes", "node_rank"), _SANDBOX),
    **dict.fromkeys(("data_parallel_address", "data_parallel_rpc_port", "data_parallel_backend"), _SANDBOX),
    **dict.fromkeys(("data_parallel_external_lb", "data_parallel_hybrid_lb", "ray_workers_use_nsight"), _SANDBOX),
    **dict.fromkeys(("kv_transfer_config", "kv_events_config", "ec_transfer_config", "profiler_config"), _SANDBOX),
    **dict.fromkeys(("logging_config", "log_config_file"), _SANDBOX),
    **dict.fromkeys(("middleware", "worker_cls", "worker_extension_cls", "scheduler_cls", "logits_processors"), _CODE),
    **dict.fromkeys(("tool_parser_plugin", "reasoning_parser_plugin", "io_processor_plugin"), _CODE),
}
FLAGS = Flags(Path(__file__).with_name("vllm_flags.json"), OWN, ALIASES, REFUSED)

_BYTES = (("turboquant_3bit", 0.5), ("turboquant", 0.75), ("int4", 0.6), ("nvfp4", 0.6), ("ultraquant", 0.6))


@dataclass(frozen=True)
class Wishes:
    """Checked settings taken apart: Pierhead's own, and ``flags`` for the server; ``context`` 0: not said."""

    device: str
    gpus: tuple[str, ...]
    threads: int
    parallel: int
    context: int
    cached: int  # tokens that a GPU's cache holds; 0: not said
    lora: dict[str, str]  # name to folder
    enable_lora: bool
    draft: str
    drafted: int  # tokens at a time; 0: not said
    ngram: bool
    flags: dict[str, Any]

    @classmethod
    def of(cls, settings: Mapping[str, Any], cpus: int, devices: Sequence[gpus.Device] = ()) -> Wishes:
        """From any settings, on a machine with these accelerators; UsageError for a wrong one."""
        left = FLAGS.canonical(settings)
        pooler = _pooler(left)
        device = gpus.chosen(left.pop("device", "auto"), devices, driver=DRIVER, capability=CAPABILITY)
        allowed = gpus.numbers(left.pop("gpus", "all"))
        pairs = [str(one).partition("=") for one in left.pop("lora", ())]
        return cls(
            device=device,
            gpus=allowed if device == "cuda" else (),
            threads=left.pop("threads", 0) or max(1, cpus),
            parallel=left.pop("parallel", 0) or (MANY if device == "cuda" else PARALLEL),
            context=left.pop("context", 0),
            cached=left.pop("cache_tokens", 0),
            lora={name.rpartition("/")[2]: (folder or name).strip("/") for name, _, folder in pairs},
            enable_lora=left.pop("enable_lora", False),
            draft=left.pop("draft", ""),
            drafted=left.pop("draft_tokens", 0),
            ngram=left.pop("ngram", False),
            flags=left | pooler,
        )

    @property
    def held(self) -> int:
        """Whole contexts for which there is a cache: on a GPU those of some requests, on the CPU of all."""
        return min(self.parallel, HELD) if self.device == "cuda" else self.parallel

    @property
    def cache_bytes(self) -> float:
        """How large a number of the KV cache is; a bound where a format has scales beside its numbers."""
        kind = str(self.flags.get("kv_cache_dtype", "auto"))
        if kind == "auto" and self.full:
            return 4.0
        for word, size in _BYTES:
            if kind.startswith(word):
                return size
        return 1.1 if "8" in kind else 2.0

    @property
    def full(self) -> bool:
        """Whether weights in 32 bits stay so."""
        return self.flags.get("dtype") in ("float32", "float")


def _pooler(settings: dict[str, Any]) -> dict[str, Any]:
    """vLLM's config of pooling, taken out of ``settings``: what it says itself wins over the common words."""
    common: dict[str, Any] = {}
    if (how := settings.pop("pooling", None)) is not None:
        common["pooling_type"] = str(how).upper()
    if (normalize := settings.pop("normalize", None)) is not None:
        common["use_activation"] = normalize
    own: Any = settings.pop("pooler_config", {})
    made: dict[str, Any] = {**common, **own} if isinstance(own, dict) else own  # pyright: ignore[reportUnknownVariableType]
    return {"pooler_config": made} if made else {}
