"""llama.cpp's parameters by name: what there is, of which type, and what may not be set; starts nothing."""

from __future__ import annotations

import difflib
import functools
import importlib
import json
from collections.abc import Mapping
from typing import Any, cast

from pierhead.engines.llamacpp_gpu import DEVICES
from pierhead.engines.setting_table import spelled, switch
from pierhead.errors import UsageError

GROUPS = ("cpuparams", "cpuparams_batch", "sampling", "speculative", "speculative.draft")

ALIASES = {
    "context": "context",
    "ctx_size": "context",
    "c": "context",
    "parallel": "parallel",
    "np": "parallel",
    "n_parallel": "parallel",
    "slots": "parallel",
    "threads": "cpuparams.n_threads",
    "n_threads": "cpuparams.n_threads",
    "t": "cpuparams.n_threads",
    "threads_batch": "cpuparams_batch.n_threads",
    "batch": "n_batch",
    "batch_size": "n_batch",
    "ubatch": "n_ubatch",
    "ubatch_size": "n_ubatch",
    "embeddings": "embedding",
    "pooling": "pooling_type",
    "flash_attn": "flash_attn_type",
    "fa": "flash_attn_type",
    "gpu_layers": "n_gpu_layers",
    "ngl": "n_gpu_layers",
    "temperature": "sampling.temp",
    "temp": "sampling.temp",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "seed": "sampling.seed",
    "rerank": "rerank",
    "reranking": "rerank",
    "lora": "lora",
    "mmproj": "mmproj",
    "cache_ram": "cache_ram_mib",
    "normalise": "embd_normalize",
    "normalize": "embd_normalize",
    "reasoning_parser": "reasoning_format",
    "reasoning_budget": "sampling.reasoning_budget_tokens",
    "draft_tokens": "speculative.draft.n_max",
    "draft_max": "speculative.draft.n_max",
    "model_draft": "draft",
    "md": "draft",
}
BOTH = {"kv_cache_type": ("cache_type_k", "cache_type_v")}  # common words that mean two

# Own names that the engine's plan turns into several parameters.
SPECIAL: dict[str, type] = {"context": int, "parallel": int, "rerank": bool, "lora": list, "mmproj": str} | {
    **dict.fromkeys(("draft", "device", "gpus"), str)
}

MOST = 1 << 24  # tokens, or slots
_SEAM = "Pierhead sets it itself"
_SANDBOX = "it would reach out of the sandbox"
REFUSED = {
    **dict.fromkeys(
        ("hostnames", "port", "api_prefix", "model", "model_alias", "model_tags", "n_ctx", "lora_adapters"), _SEAM
    ),
    **dict.fromkeys(
        ("endpoint_metrics", "ctx_shift", "fit_params", "fit_params_target", "reuse_port", "kv_unified"), _SEAM
    ),
    **dict.fromkeys(("api_keys", "hf_token", "ssl_file_key", "ssl_file_cert"), "secrets and TLS belong to the gateway"),
    **dict.fromkeys(("server_tools", "server_tools_runtime", "mcp_servers_config", "mcp_servers_json"), _SANDBOX),
    **dict.fromkeys(("ui", "ui_mcp_proxy", "ui_config_json", "public_path", "media_path", "slot_save_path"), _SANDBOX),
    **dict.fromkeys(("models_dir", "models_preset", "models_preset_hf", "models_autoload", "server_base"), _SANDBOX),
    **dict.fromkeys(
        ("logits_file", "out_file", "path_prompt_cache", "path_prompts_log_dir", "logits_output_dir"), _SANDBOX
    ),
    **dict.fromkeys(("prompt_file", "in_files", "context_files", "image", "video_ffmpeg_bin_dir"), _SANDBOX),
    **dict.fromkeys(
        ("cors_origins", "cors_headers", "cors_methods", "cors_credentials"), "CORS belongs to the gateway"
    ),
}


@functools.cache
def table() -> dict[str, Any]:
    """Every settable parameter with llama.cpp's default, as the installed engine has it."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    found: dict[str, Any] = {}
    params: Any = xllamacpp.CommonParams()

    def walk(owner: Any, prefix: str) -> None:
        for name in dir(owner):
            full = f"{prefix}{name}"
            if name.startswith("_") or full in REFUSED:
                continue
            value = getattr(owner, name)
            if full in GROUPS:
                walk(value, f"{full}.")
            elif isinstance(value, bool | int | float | str | list | tuple | set | dict) or hasattr(
                cast("Any", type(value)), "__members__"
            ):
                found[full] = value

    walk(params, "")
    return found


def usual() -> dict[str, Any]:
    """The defaults of all of them, as ``canonical`` would have them."""
    shown = {name: _shown(value) for name, value in table().items() if not name.endswith("cpumask")}
    return {"device": "auto", "gpus": "all"} | shown


def spelled_out(name: str, value: Any) -> Any:
    """A canonical value as a person types it: of an enumeration the short word."""
    members = getattr(cast("Any", type(table().get(name))), "__members__", None)
    return dict(zip(members, _short(members), strict=True)).get(value, value) if members and value else value


def _shown(value: Any) -> Any:
    members = getattr(cast("Any", type(value)), "__members__", None)
    if members is not None:
        return dict(zip(members, _short(members), strict=True)).get(str(value.name), str(value.name))
    if isinstance(value, bool | int | float | str | dict):
        return value  # pyright: ignore[reportUnknownVariableType]
    return list(value) if isinstance(value, list | tuple | set) else str(value.name)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under llama.cpp's own names with values of the right type; UsageError for what is not one."""
    done: dict[str, Any] = {}
    for given, value in settings.items():
        for name in BOTH.get(spelled(given)) or (_name(given),):
            done[name] = _value(given, name, value)
    return done


def _name(given: str) -> str:
    plain = spelled(given)
    name = ALIASES.get(plain, plain)
    if name in SPECIAL:
        return name
    if name in REFUSED or plain in REFUSED:
        reason = REFUSED.get(name) or REFUSED[plain]
        hint = {"n_ctx": "Use 'context' instead.", "lora_adapters": "Use 'lora' instead."}.get(plain, "Leave it out.")
        raise UsageError(f"the engine parameter '{given}' cannot be set: {reason}", hint=hint)
    known = table()
    if name in known:
        return name
    choices = [*known, *ALIASES, *BOTH]
    close = difflib.get_close_matches(name, choices, 1, 0.5) or difflib.get_close_matches(plain, choices, 1, 0.4)
    raise UsageError(
        f"unknown engine parameter '{given}'",
        hint=f"Did you mean '{close[0]}'?" if close else "`pier run --help` names the common ones.",
        data={"parameter": given, "closest": close[0] if close else None},
    )


def _value(given: str, name: str, value: Any) -> Any:
    if name in SPECIAL:
        return _special(given, name, value)
    now = table()[name]
    if name == "embd_normalize":
        value = _norm(value)
    members = getattr(cast("Any", type(now)), "__members__", None)
    try:
        if members is not None:
            return _member(type(now), members, value)
        return _plain(now, value)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        wanted = " or ".join(_short(members)) if members else type(now).__name__
        raise UsageError(
            f"bad value {value!r:.60} for engine parameter '{given}'", hint=f"It must be: {wanted}."
        ) from exc


def _norm(value: Any) -> Any:
    """llama.cpp's number for a norm: a switch means the usual one, or none."""
    switch = value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())
    return value if switch is None else 2 if switch else -1


def _special(given: str, name: str, value: Any) -> Any:
    kind = SPECIAL[name]
    if name == "device":
        return _device(given, value)
    try:
        if name == "lora":
            return [_adapter(entry) for entry in (value if isinstance(value, list) else str(value).split(","))]  # pyright: ignore[reportUnknownVariableType]
        plain = _plain(kind(), value)
    except (TypeError, ValueError, KeyError, OverflowError) as exc:
        raise UsageError(
            f"bad value {value!r:.60} for engine parameter '{given}'", hint=f"It must be: {kind.__name__}."
        ) from exc
    low = {"context": 0, "parallel": 1}.get(name)
    if low is not None and not low <= plain <= MOST:
        hint = f"It must be a whole number from {low} to {MOST}."
        raise UsageError(f"bad value {value} for engine parameter '{given}'", hint=hint)
    return plain


def _device(given: str, value: Any) -> str:
    if value not in DEVICES:
        hint = f"It must be: {' or '.join(DEVICES)}."
        raise UsageError(f"bad value {value!r:.60} for engine parameter '{given}'", hint=hint)
    return str(value)


def _adapter(entry: Any) -> dict[str, Any]:
    if isinstance(entry, dict):
        return {"file": str(entry["file"]), "scale": float(entry.get("scale", 1.0))}  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
    name, _, scale = str(entry).partition("=")
    return {"file": name.strip(), "scale": float(scale or 1.0)}


def _plain(now: Any, value: Any) -> Any:
    if isinstance(now, bool):
        return switch(value)
    if isinstance(now, int):
        number = int(value) if not isinstance(value, bool) and float(value) == int(float(value)) else _refuse()
        return number if -(1 << 63) <= number < 1 << 63 else _refuse()
    if isinstance(now, float):
        return float(value) if not isinstance(value, bool) else _refuse()
    if isinstance(now, str):
        return value if isinstance(value, str) and "\0" not in value else _refuse()
    made = json.loads(value) if isinstance(value, str) else value
    if not isinstance(made, list | dict) or isinstance(made, dict) != isinstance(now, dict):
        _refuse()
    json.dumps(made)  # what cannot be written down cannot be handed to the engine
    return made  # pyright: ignore[reportUnknownVariableType]


def _refuse() -> Any:
    raise ValueError


def _short(members: Mapping[str, Any]) -> list[str]:
    """The members' names without the prefix that they share, in lower case."""
    names = list(members)
    prefix = names[0][: names[0].rfind("_") + 1]
    while prefix and not all(n.startswith(prefix) for n in names):
        prefix = prefix[: prefix.rstrip("_").rfind("_") + 1]
    return [n[len(prefix) :].lower() for n in names]


def _member(kind: Any, members: Mapping[str, Any], value: Any) -> str:
    """The full name of an enumeration's member that a short or full name or a number means."""
    if isinstance(value, int) and not isinstance(value, bool):
        name = str(kind(value).name)
        return name if name in members else _refuse()  # a flag type takes any number
    text = str(value).lower()
    if "flash_attn" in kind.__name__:
        text = {"on": "enabled", "true": "enabled", "off": "disabled", "false": "disabled"}.get(text, text)
    for full, short in zip(members, _short(members), strict=True):
        if text in (full.lower(), short):
            return full
    return _refuse()
