"""What a client asks for, checked: sampling in OpenVINO GenAI's words; what cannot be expressed in them is refused."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Wishes that this engine cannot fulfil, each with the value that wishes for nothing.
_CANNOT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "audio": (),
    "prediction": (),
    "typical_p": (1,),
    "mirostat": (0,),
}
# Name to the name of GenerationConfig and the bounds.
_NUMBERS: dict[str, tuple[str, float, float]] = {
    "temperature": ("temperature", 0, 100),
    "top_p": ("top_p", 0, 1),
    "min_p": ("min_p", 0, 1),
    "presence_penalty": ("presence_penalty", -2, 2),
    "frequency_penalty": ("frequency_penalty", -2, 2),
    "repetition_penalty": ("repetition_penalty", 0.01, 100),
    "repeat_penalty": ("repetition_penalty", 0.01, 100),
}
_SEEDS = 1 << 63


class Refused(Exception):
    """A request that cannot be served: what to tell the client, and which of its words is meant."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status


@dataclass(frozen=True)
class Ask:
    """One request: ``messages`` or ``prompt``, what sampling is to be like, and how to answer."""

    messages: list[dict[str, Any]]
    prompt: str
    tokens: int | None  # at most so many are written
    sampling: dict[str, Any]  # of GenerationConfig
    schema: str  # JSON schema that the answer has to fit, or ""
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    extra: dict[str, Any] = field(default_factory=dict[str, Any])  # for the chat template


def read(body: Mapping[str, Any], chat: bool) -> Ask:
    """A body as a request; Refused says what is wrong with it."""
    for name, nothing in _CANNOT.items():
        if body.get(name) is not None and body[name] not in nothing:
            raise Refused(f"'{name}' is not something that OpenVINO GenAI can do here", name)
    options: Any = body.get("stream_options") or {}
    extra: Any = body.get("chat_template_kwargs") or {}
    if not isinstance(options, dict) or not isinstance(extra, dict):
        raise Refused("'stream_options' and 'chat_template_kwargs' must be objects", "stream_options")
    tokens = _whole(body, "max_completion_tokens", 0, 1 << 30)
    return Ask(
        messages=_messages(body) if chat else [],
        prompt="" if chat else _prompt(body),
        tokens=_whole(body, "max_tokens", 0, 1 << 30) if tokens is None else tokens,
        sampling=_sampling(body),
        schema=_schema(body),
        stops=_stops(body),
        stream=body.get("stream") is True,
        usage=options.get("include_usage") is True,  # pyright: ignore[reportUnknownMemberType]
        extra=extra,  # pyright: ignore[reportUnknownArgumentType]
    )


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (ours, low, high) in _NUMBERS.items():
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise Refused(f"'{name}' must be a number from {low:g} to {high:g}, not {value!r:.40}", name)
        found[ours] = float(value)
    top_k = _whole(body, "top_k", -1, 1 << 30)
    if top_k is not None and top_k > 0:
        found["top_k"] = top_k
    if body.get("ignore_eos") is True:
        found["ignore_eos"] = True
    if found.get("top_p") == 0:
        found |= {"top_p": 1.0, "top_k": 1}
    warmth = found.pop("temperature", 1.0)
    if warmth == 0:
        return {**{k: v for k, v in found.items() if k not in ("top_p", "min_p", "top_k")}, "do_sample": False}
    seed = _whole(body, "seed", -_SEEDS, _SEEDS)
    found["rng_seed"] = secrets.randbits(31) if seed is None or seed == -1 else seed % (1 << 31)
    return {**found, "temperature": warmth, "do_sample": True}


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused(f"'{name}' must be a whole number from {low} to {high}, not {value!r:.40}", name)
    return value


def _schema(body: Mapping[str, Any]) -> str:
    wish: Any = body.get("response_format") or {}
    kind: Any = wish.get("type", "text") if isinstance(wish, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if kind == "text":
        return ""
    if kind == "json_object":
        return '{"type":"object"}'
    if kind == "json_schema":
        inner: Any = wish.get("json_schema")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        schema: Any = inner.get("schema") if isinstance(inner, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if isinstance(schema, dict):
            return json.dumps(schema)
    raise Refused("'response_format' must be text, json_object or json_schema with a schema", "response_format")


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    given: Any = body.get("stop")
    listed: Any = [given] if isinstance(given, str) else given or []
    if not isinstance(listed, list) or not all(isinstance(s, str) for s in listed) or len(listed) > 16:  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        raise Refused("'stop' must be a string or a list of up to 16", "stop")
    return tuple(s for s in listed if s)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    given: Any = body.get("messages")
    if not isinstance(given, list) or not given:
        raise Refused("'messages' must be a list with at least one message", "messages")
    made: list[dict[str, Any]] = []
    for message in given:  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):  # pyright: ignore[reportUnknownMemberType]
            raise Refused("each message must have a role", "messages")
        made.append({"role": message["role"], "content": _content(message.get("content"))})  # pyright: ignore[reportUnknownMemberType]
    return made


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[str] = []
    for part in content if isinstance(content, list) else [None]:  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):  # pyright: ignore[reportUnknownMemberType]
            raise Refused("this model reads text only", "messages")
        parts.append(part["text"])  # pyright: ignore[reportUnknownArgumentType]
    return "\n".join(parts)


def _prompt(body: Mapping[str, Any]) -> str:
    given: Any = body.get("prompt")
    if isinstance(given, list) and len(given) == 1:  # pyright: ignore[reportUnknownArgumentType]
        given = given[0]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(given, str):
        raise Refused("'prompt' must be one string", "prompt")
    return given
