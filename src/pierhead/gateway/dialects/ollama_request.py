"""Ollama's requests for text as an OpenAI engine understands them: messages, options, formats; pure, asks nobody."""

from __future__ import annotations

import binascii
import difflib
import re
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from pierhead.gateway.dialects.base import Facts
from pierhead.gateway.faults import Fault, bad_request

T = TypeVar("T")
_FOREVER = -1.0
# Ollama's options as llama.cpp's server calls them, with their types.
_OPTIONS: dict[str, tuple[str, type]] = {
    "num_predict": ("max_tokens", int),
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "typical_p": ("typical_p", float),
    "repeat_penalty": ("repeat_penalty", float),
    "repeat_last_n": ("repeat_last_n", int),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "mirostat": ("mirostat", int),
    "mirostat_tau": ("mirostat_tau", float),
    "mirostat_eta": ("mirostat_eta", float),
    "seed": ("seed", int),
    "num_keep": ("n_keep", int),
    "stop": ("stop", list),
}
# The same in the words of engines that are not llama.cpp's; what is not here they do not know.
_ELSEWHERE = {
    "repeat_penalty": "repetition_penalty",
    **{n: n for n in ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "seed")},
    "num_predict": "max_tokens",
    "stop": "stop",
}
# How a model is run, which was settled when it was started: nothing in an answer depends on them.
_MACHINE = frozenset(
    (
        *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "numa"),
        *("low_vram", "f16_kv", "vocab_only", "draft_num_predict"),
    )
)
_IMAGES = {"/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp"}
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|μs|ms|s|m|h)(?:(?:\d+(?:\.\d*)?|\.\d+)[a-zµμ]{1,2})*")
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")


class Function(msgspec.Struct):
    """A call's function; arguments are an object here, and text with OpenAI."""

    name: str
    arguments: dict[str, Any] = {}


class ToolCall(msgspec.Struct):
    """A call that the model made earlier."""

    function: Function
    id: str = ""


class Message(msgspec.Struct):
    """One message of a chat."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Common(msgspec.Struct, kw_only=True):
    """What requests for text share."""

    model: str
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class ChatRequest(Common, kw_only=True):
    """``POST /api/chat``."""

    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(Common, kw_only=True):
    """``POST /api/generate``."""

    prompt: str | None = None
    suffix: str | None = None
    images: list[str] | None = None
    system: str | None = None
    template: str | None = None
    raw: bool | None = None
    context: list[int] | None = None


class EmbedRequest(msgspec.Struct, kw_only=True):
    """``POST /api/embed``."""

    model: str
    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


class EmbeddingsRequest(msgspec.Struct, kw_only=True):
    """``POST /api/embeddings``, which gives one vector as the engine made it."""

    model: str
    prompt: str | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


def decoded(body: bytes, kind: type[T]) -> T:
    """The request; Fault 400 says which member is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        param = str(exc).rpartition("`$.")[2].rstrip("`") if "`$." in str(exc) else None
        raise bad_request(f"the request cannot be used: {exc}.", code="invalid_json", param=param) from exc


def seconds(given: float | str | None) -> float | None:
    """A ``keep_alive`` in seconds, -1 for ever; None when it was not said."""
    if given is None:
        return None
    if isinstance(given, str):
        given = _parsed(given.strip())
    if given != given or abs(given) > 1e12:
        raise bad_request("keep_alive is not a usable time.", param="keep_alive")
    return _FOREVER if given < 0 else float(given)


def _parsed(text: str) -> float:
    try:
        return float(text)  # Ollama's own clients write "0" or "-1" too
    except ValueError:
        pass
    parts = _PART.findall(text)
    if not _DURATION.fullmatch(text) or "".join(n + u for n, u in parts) != text.lstrip("+-"):
        raise bad_request(
            f"keep_alive is {text[:40]!r}, not a duration; write seconds, or as '5m', '1h30m'.", param="keep_alive"
        )
    found = sum(float(number) * _UNITS[unit] for number, unit in parts)
    return -found if text.startswith("-") else found


def settings(options: dict[str, Any] | None, facts: Facts) -> dict[str, Any]:
    """The engine's members for Ollama's options; Fault 400 names one that it cannot keep."""
    made: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if value is None or name in _MACHINE:
            continue
        if name not in _OPTIONS:
            close = difflib.get_close_matches(name, _OPTIONS, 1)
            raise bad_request(
                f"there is no option '{name[:60]}'." + (f" Did you mean '{close[0]}'?" if close else ""),
                param=f"options.{name[:60]}",
            )
        member, kind = _OPTIONS[name]
        if not llamacpp(facts):
            if name not in _ELSEWHERE:
                raise bad_request(f"the engine of '{facts.model}' has no option '{name}'.", param=f"options.{name}")
            member = _ELSEWHERE[name]
        made[member] = _typed(name, value, kind)
    _context(options, facts)
    return _bounded(made, facts.cap)


def _typed(name: str, value: Any, kind: type) -> Any:
    if kind is list:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(t, str) for t in texts):  # pyright: ignore[reportUnknownVariableType]
            return texts  # pyright: ignore[reportUnknownVariableType]
        raise bad_request(f"the option '{name}' must be a list of strings.", param=f"options.{name}")
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
        raise bad_request(f"the option '{name}' must be a number.", param=f"options.{name}")
    return kind(value)


def _context(options: dict[str, Any] | None, facts: Facts) -> None:
    """A longer context than the model runs with would need another start of it."""
    wanted = (options or {}).get("num_ctx")
    if isinstance(wanted, int | float) and facts.context and wanted > facts.context:
        raise bad_request(
            f"the option num_ctx asks for {int(wanted)} tokens; '{facts.model}' runs with {facts.context}. "
            f"Start it with more: pier run {facts.model} --context {int(wanted)}",
            code="context_length_exceeded",
            param="options.num_ctx",
        )


def _bounded(made: dict[str, Any], cap: int) -> dict[str, Any]:
    if made.get("seed") == -1:  # Ollama's word for any
        del made["seed"]
    limit = made.get("max_tokens")
    if limit is not None and limit < 0:  # -1: no end, -2: until the context is full
        del made["max_tokens"]
        limit = None
    if cap:
        made["max_tokens"] = cap if limit is None else min(limit, cap)
    return made


def shaped(format: str | dict[str, Any] | None) -> dict[str, Any]:
    """The ``response_format`` member for a format, where there is one."""
    if format is None or format == "":
        return {}
    if format == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(format, str):
        raise bad_request("format must be 'json' or a JSON schema.", param="format")
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": format}}}


def thinking(think: bool | str | None, facts: Facts) -> dict[str, Any]:
    """Members that turn thinking on or off, or say how hard."""
    if think is None:
        return {}
    if isinstance(think, str) and think not in ("low", "medium", "high", "max"):
        raise bad_request("think must be a boolean, 'low', 'medium', 'high' or 'max'.", param="think")
    able = facts.card.get("capabilities")
    if think and able is not None and "thinking" not in able:
        raise Fault(400, "not_supported", f'"{facts.model}" does not support thinking', param="think")
    words: dict[str, Any] = {"enable_thinking": bool(think)}
    if isinstance(think, str):
        words["reasoning_effort"] = "high" if think == "max" else think
    return {"chat_template_kwargs": words}


def probabilities(request: Common) -> dict[str, Any]:
    """Members that ask for log probabilities."""
    top = request.top_logprobs or 0
    if not 0 <= top <= 20:
        raise bad_request("top_logprobs must be between 0 and 20.", param="top_logprobs")
    if not request.logprobs:
        return {}
    return {"logprobs": True, "top_logprobs": top} if top else {"logprobs": True}


def messages(given: Iterable[Message], facts: Facts) -> list[dict[str, Any]]:
    """A chat's messages; calls without ids get some, and results those of the calls before them."""
    made: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []  # id and name of calls that no result was told for yet
    for number, message in enumerate(given):
        role = message.role.lower()
        if role not in ("system", "user", "assistant", "tool", "developer"):
            raise bad_request(f"there is no role '{message.role[:40]}'.", param=f"messages[{number}].role")
        one: dict[str, Any] = {"role": role, "content": content(message.content or "", message.images, facts)}
        if message.thinking:
            one["reasoning_content"] = message.thinking
        if message.tool_calls:
            one["tool_calls"] = [_call(call, f"call_{number}_{i}") for i, call in enumerate(message.tool_calls)]
            waiting = [(c["id"], c["function"]["name"]) for c in one["tool_calls"]]
        if role == "tool":
            one["tool_call_id"] = message.tool_call_id or _answered(waiting, message.tool_name)
            if message.tool_name:
                one["name"] = message.tool_name
        made.append(one)
    return made


def content(text: str, images: list[str] | None, facts: Facts) -> str | list[dict[str, Any]]:
    """Text, or with images the parts of a message."""
    if not images:
        return text
    able = facts.card.get("capabilities")
    if able is not None and "vision" not in able:
        raise Fault(400, "not_supported", f'"{facts.model}" does not support images', param="images")
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    for number, image in enumerate(images):
        try:
            binascii.a2b_base64(image, strict_mode=True)
        except (ValueError, binascii.Error) as exc:
            raise bad_request(f"image {number + 1} is not base64.", param="images") from exc
        kind = next((k for start, k in _IMAGES.items() if image.startswith(start)), "png")
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{image}"}})
    return parts


def _call(call: ToolCall, id: str) -> dict[str, Any]:
    arguments = msgspec.json.encode(call.function.arguments).decode()
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or id, "type": "function", "function": function}


def _answered(waiting: list[tuple[str, str]], name: str | None) -> str:
    """The call that a result without an id belongs to: the first of its name, else the first that waits."""
    found = next((c for c in waiting if name and c[1] == name), waiting[0] if waiting else None)
    if found is None:
        return "call_0"
    waiting.remove(found)
    return found[0]


def llamacpp(facts: Facts) -> bool:
    """Whether the engine is llama.cpp, which knows more words than OpenAI's."""
    return "llamacpp-props" in facts.serves
