"""Settings that several engines have under one name: their kinds and meanings, as data; each engine maps its own names.

``EngineFacts.common`` says which of them an engine knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pierhead.engines.setting_table import spelled, switch
from pierhead.errors import UsageError


class Common(NamedTuple):
    """A setting: a whole number within bounds, a switch, one word of ``choices``, or free text."""

    kind: type
    meaning: str
    low: int = 0
    high: int = 1 << 24
    choices: tuple[str, ...] = ()


_CACHES = ("f32", "f16", "bf16", "fp8", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_POOLINGS = ("none", "mean", "cls", "last", "max", "rank")
COMMON: dict[str, Common] = {
    "context": Common(int, "Tokens of a request and its answer; 0: as many as fit."),
    "parallel": Common(int, "Requests that it works on at a time.", low=1, high=4096),
    "threads": Common(int, "Processor threads that it works with.", low=1, high=4096),
    "kv_cache_type": Common(
        str, "How numbers of the KV cache are kept; smaller ones need less memory.", choices=_CACHES
    ),
    "pooling": Common(str, "How the vectors of tokens become one.", choices=_POOLINGS),
    "normalize": Common(bool, "Whether vectors of embeddings have length 1."),
    "reasoning_parser": Common(str, "How the engine tells thoughts from the answer; a word of the engine's own."),
    "reasoning_budget": Common(int, "Tokens of thought at most; -1: no bound, 0: none.", low=-1),
    "tool_parser": Common(str, "How the engine reads tool calls; a word of the engine's own."),
    "draft": Common(str, "A smaller model of the store that drafts tokens, which this one only checks."),
    "draft_tokens": Common(int, "Tokens that are drafted at a time.", low=1, high=64),
}


def checked(name: str, value: Any) -> Any:
    """The value of a common setting as its own kind; UsageError says what it must be."""
    setting = COMMON[name]
    try:
        return _value(setting, value)
    except (TypeError, ValueError, OverflowError) as exc:
        raise UsageError(f"bad value {value!r:.60} for '{name}'", hint=f"It must be {wanted(setting)}.") from exc


def _value(setting: Common, value: Any) -> Any:
    if setting.kind is bool:
        return switch(value)
    if setting.kind is str:
        text = value.strip() if isinstance(value, str) else _refuse()
        if setting.choices:
            return text.lower() if text.lower() in setting.choices else _refuse()
        return text if text and text.isprintable() and len(text) <= 255 else _refuse()
    number = _refuse() if isinstance(value, bool) else float(value)
    if number != int(number) or not setting.low <= number <= setting.high:
        _refuse()
    return int(number)


def _refuse() -> Any:
    raise ValueError


def wanted(setting: Common) -> str:
    """What a value must be, in words."""
    if setting.kind is bool:
        return "true or false"
    if setting.choices:
        return ", ".join(setting.choices[:-1]) + f" or {setting.choices[-1]}"
    return "text" if setting.kind is str else f"a whole number from {setting.low} to {setting.high}"


def split(settings: Mapping[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of ``settings`` that are the common ones ``names``, checked, and the rest as it was given."""
    common: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for given, value in settings.items():
        name = spelled(given)
        if name in names:
            common[name] = checked(name, value)
        else:
            rest[given] = value
    return common, rest
