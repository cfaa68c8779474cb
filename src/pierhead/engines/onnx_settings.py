"""The ONNX engine's settings by name: which there are, of which kind, and in which bounds; starts nothing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from pierhead.errors import UsageError


class Setting(NamedTuple):
    """A whole or fractional number within bounds, a switch, a word of some, or free text (no choices)."""

    kind: type
    default: Any
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()


PROVIDERS = ("cpu", "cuda", "tensorrt", "openvino")
TASKS = ("auto", "classify", "tokens", "embeddings", "rerank", "tensors")
SETTINGS: dict[str, Setting] = {
    "task": Setting(str, "auto", choices=TASKS),
    "file": Setting(str, ""),
    "provider": Setting(str, "cpu", choices=PROVIDERS),
    "device": Setting(str, ""),
    "threads": Setting(int, 0, 0, 1024),
    "inter_threads": Setting(int, 1, 1, 256),
    "workers": Setting(int, 1, 1, 64),
    "spin": Setting(bool, False),
    "optimization": Setting(str, "all", choices=("all", "extended", "basic", "none")),
    "max_batch": Setting(int, 32, 1, 4096),
    "max_batch_tokens": Setting(int, 4096, 1, 1 << 22),
    "max_delay_ms": Setting(float, 0.0, 0, 10_000),
    "queue": Setting(int, 1024, 1, 1 << 20),
    "context": Setting(int, 0, 0, 1 << 20),
    "truncate": Setting(bool, False),
    "pooling": Setting(str, "auto", choices=("auto", "mean", "cls", "max", "last")),
    "normalize": Setting(str, "auto", choices=("auto", "true", "false")),
    "activation": Setting(str, "auto", choices=("auto", "softmax", "sigmoid", "none")),
    "max_body_mb": Setting(int, 32, 1, 1024),
}
ALIASES = {
    "max_length": "context",
    "max_model_len": "context",
    "execution_provider": "provider",
    "ep": "provider",
    "intra_threads": "threads",
    "intra_op_num_threads": "threads",
    "inter_op_num_threads": "inter_threads",
    "instances": "workers",
    "max_batch_size": "max_batch",
    "batch": "max_batch",
    "batch_size": "max_batch",
    "delay": "max_delay_ms",
    "max_delay": "max_delay_ms",
    "batch_delay_ms": "max_delay_ms",
    "max_queue": "queue",
    "queue_size": "queue",
    "graph_optimization": "optimization",
    "normalise": "normalize",
    "device_id": "device",
    "model": "file",
}
_SWITCH = {**dict.fromkeys(("true", "1", "on", "yes"), True), **dict.fromkeys(("false", "0", "off", "no"), False)}


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their own names with values of the right kind; UsageError for what is not one."""
    done: dict[str, Any] = {}
    for given, value in settings.items():
        name = _name(given)
        try:
            done[name] = _value(SETTINGS[name], value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise UsageError(
                f"bad value {value!r:.60} for the setting '{given}' of the ONNX engine",
                hint=f"It must be: {_wanted(SETTINGS[name])}.",
            ) from exc
    return done


def _name(given: str) -> str:
    plain = given.strip().lstrip("-").replace("-", "_").lower()
    name = ALIASES.get(plain, plain)
    if name in SETTINGS:
        return name
    close = difflib.get_close_matches(plain, [*SETTINGS, *ALIASES], 1, 0.5)
    hint = f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(SETTINGS)}."
    raise UsageError(
        f"the ONNX engine has no setting '{given}'",
        hint=hint,
        data={"parameter": given, "closest": close[0] if close else None},
    )


def _value(setting: Setting, value: Any) -> Any:
    if setting.kind is bool:
        return _switch(value)
    if setting.kind is str:
        text = ("true" if value else "false") if isinstance(value, bool) else str(value)
        if setting.choices:
            text = text.lower()
            if text not in setting.choices:
                raise ValueError
        elif len(text) > 1024 or "\0" in text or ".." in text.split("/") or text.startswith("/"):
            raise ValueError
        return text
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    if setting.kind is int:
        if number != int(number):
            raise ValueError
        number = int(number)
    if not setting.low <= number <= setting.high:
        raise ValueError
    return number


def _switch(value: Any) -> bool:
    found = value if isinstance(value, bool) else _SWITCH.get(str(value).lower())
    if found is None:
        raise ValueError
    return found


def _wanted(setting: Setting) -> str:
    if setting.kind is bool:
        return "true or false"
    if setting.choices:
        return ", ".join(setting.choices)
    if setting.kind is str:
        return "a name inside the model's folder"
    return f"{'a whole number' if setting.kind is int else 'a number'} from {setting.low:g} to {setting.high:g}"
