"""Counts the tokens of a chat request's prompt by llama.cpp's own template and tokenizer; pure."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import msgspec

from pierhead.gateway.dialects.base import Call, Facts
from pierhead.gateway.faults import Fault
from pierhead.gateway.tool_choice import adapt

_T = TypeVar("_T")
_encode = msgspec.json.Encoder().encode


class _Rendered(msgspec.Struct):
    prompt: str


class _Cut(msgspec.Struct):
    tokens: list[msgspec.Raw]


def count(chat: dict[str, Any], facts: Facts) -> Generator[Call, bytes | None, int]:
    """The tokens of a chat request's prompt; Fault 502 when the engine's answers are none."""
    rendered = _told((yield Call("llamacpp-template", adapt(_encode(chat), facts.call_prefix))), _Rendered)
    text = {"content": rendered.prompt, "add_special": True, "parse_special": True}
    return len(_told((yield Call("llamacpp-tokenize", _encode(text))), _Cut).tokens)


def _told(body: bytes | None, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body or b"", type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise Fault(502, "engine_failed", f"the engine's answer cannot be read: {exc}.", source="engine") from exc
