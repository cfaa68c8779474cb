"""Answers of Anthropic's Messages API in the words of OpenAI's chat, whole and as a stream of chunks; pure."""

from __future__ import annotations

from typing import Any

import msgspec

from pierhead.gateway.dialects.base import Facts
from pierhead.gateway.faults import Fault
from pierhead.gateway.usage import NOTHING, Usage, merged, tokens

_encode = msgspec.json.Encoder().encode
_LONGEST = 64 << 20  # bytes of one event
_REASONS = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_STATUSES = {
    "overloaded_error": 503,
    "rate_limit_error": 429,
    "invalid_request_error": 400,
    "timeout_error": 504,
}


class _Block(msgspec.Struct):
    type: str = ""
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}
    partial_json: str = ""
    stop_reason: str | None = None


class _Message(msgspec.Struct):
    content: list[_Block] = []
    stop_reason: str | None = None


class _Error(msgspec.Struct):
    type: str = ""
    message: str = ""


class _Event(msgspec.Struct):
    type: str = ""
    index: int = 0
    content_block: _Block = msgspec.field(default_factory=_Block)
    delta: _Block = msgspec.field(default_factory=_Block)
    error: _Error | None = None


_message = msgspec.json.Decoder(_Message).decode
_event = msgspec.json.Decoder(_Event).decode
_ERRORS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def completion(body: bytes, usage: Usage, facts: Facts) -> bytes:
    """The whole answer."""
    try:
        said = _message(body)
    except _ERRORS as exc:
        raise _odd(str(exc)) from exc
    text = "".join(block.text for block in said.content if block.type == "text")
    thought = "\n".join(block.thinking for block in said.content if block.type == "thinking" and block.thinking)
    calls = [
        {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": _encode(b.input).decode()}}
        for b in said.content
        if b.type == "tool_use"
    ]
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(said.stop_reason)}
    return _encode(_envelope(facts, "chat.completion") | {"choices": [choice], "usage": _usage(usage)})


def _envelope(facts: Facts, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{facts.id}", "object": kind, "created": facts.created, "model": facts.model}


def _reason(stop: str | None) -> str:
    return _REASONS.get(stop or "", "stop")


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _odd(why: str) -> Fault:
    return Fault(502, "engine_error", f"the answer cannot be understood: {why}.", source="engine")


class Events:
    """The stream; ``tells_usage`` when the client asked for the usage."""

    def __init__(self, facts: Facts, *, tells_usage: bool) -> None:
        self._envelope = _envelope(facts, "chat.completion.chunk")
        self._tells = tells_usage
        self._held = b""
        self._calls: dict[int, int] = {}  # index of a block → index of its call
        self._usage = NOTHING
        self._stop: str | None = None
        self._done = False

    def feed(self, data: bytes) -> bytes:
        """The chunks that these events become, wherever they are cut."""
        data = (self._held + data).replace(b"\r\n", b"\n")
        cut = data.rfind(b"\n\n") + 2
        if cut < 2:
            cut = 0
        self._held = data[cut:]
        if len(self._held) > _LONGEST:
            raise _odd("one of its events is too long")
        return b"".join(self._one(event) for event in data[:cut].split(b"\n\n") if event)

    def _one(self, raw: bytes) -> bytes:
        text = b"\n".join(line[5:].strip() for line in raw.split(b"\n") if line.startswith(b"data:"))
        if not text:
            return b""
        try:
            event = _event(text)
        except _ERRORS as exc:
            raise _odd(str(exc)) from exc
        kind = event.type
        if kind == "error" or event.error is not None:
            error = event.error or _Error()
            raise Fault(_STATUSES.get(error.type, 502), error.type or "engine_error", error.message, source="engine")
        if kind == "message_start":
            self._usage = tokens(text)
            return self._chunk({"role": "assistant", "content": ""})
        if kind == "content_block_start":
            return self._begin(event)
        if kind == "content_block_delta":
            return self._piece(event)
        if kind == "message_delta":
            self._stop = event.delta.stop_reason or self._stop
            self._usage = merged(self._usage, tokens(text))
        elif kind == "message_stop":
            self._done = True
        return b""

    def _begin(self, event: _Event) -> bytes:
        block = event.content_block
        if block.type == "text" and block.text:
            return self._chunk({"content": block.text})
        if block.type != "tool_use":
            return b""
        self._calls[event.index] = number = len(self._calls)
        function = {"name": block.name, "arguments": _encode(block.input).decode() if block.input else ""}
        return self._chunk(
            {"tool_calls": [{"index": number, "id": block.id, "type": "function", "function": function}]}
        )

    def _piece(self, event: _Event) -> bytes:
        delta = event.delta
        if delta.type == "text_delta":
            return self._chunk({"content": delta.text})
        if delta.type == "thinking_delta":
            return self._chunk({"reasoning_content": delta.thinking})
        if delta.type == "input_json_delta" and event.index in self._calls:
            piece = {"index": self._calls[event.index], "function": {"arguments": delta.partial_json}}
            return self._chunk({"tool_calls": [piece]})
        return b""

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return b"data: %b\n\n" % _encode(self._envelope | {"choices": [choice]})

    def end(self) -> bytes:
        """The last chunks; Fault when the stream broke off."""
        rest = self.feed(b"\n\n") if self._held.strip() else b""
        if not self._done:
            raise _odd("its stream ended without message_stop")
        last = rest + self._chunk({}, _reason(self._stop))
        if self._tells:
            last += b"data: %b\n\n" % _encode(self._envelope | {"choices": [], "usage": _usage(self._usage)})
        return last + b"data: [DONE]\n\n"
