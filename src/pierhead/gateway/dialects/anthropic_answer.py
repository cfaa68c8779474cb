"""An engine's chat answer in the words of Anthropic's Messages API, whole and as a stream of events; pure."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import msgspec

from pierhead.gateway.dialects import chat
from pierhead.gateway.dialects.anthropic_request import Shape
from pierhead.gateway.dialects.base import Facts
from pierhead.gateway.usage import NOTHING, Usage

_PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_arguments = msgspec.json.Decoder(dict[str, Any]).decode
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "function_call": "tool_use", "content_filter": "refusal"}


def message(body: bytes, usage: Usage, facts: Facts, shape: Shape) -> bytes:
    """The whole answer."""
    chunk, choice, said = chat.whole(body)
    content: list[dict[str, Any]] = []
    if said.thought:
        content.append(
            {"type": "thinking", "thinking": "" if shape.hides else said.thought, "signature": signature(said.thought)}
        )
    text = (said.content or said.refusal or "").removeprefix(shape.prefill)  # llama.cpp repeats what it was given
    if text:
        content.append({"type": "text", "text": text, "citations": None})
    for number, (call, name, arguments) in enumerate(chat.calls(said)):
        content.append(_tool_use(_call_id(call, facts, number), name, _object(arguments)))
    if not content:
        content.append({"type": "text", "text": "", "citations": None})
    reason = _reason(choice.finish_reason, chunk.stopped_by, usage, facts, shape, bool(said.tool_calls))
    return msgspec.json.encode(
        _envelope(facts, usage)
        | {"content": content, "stop_reason": reason, "stop_sequence": chunk.stopped_by or None, "stop_details": None}
    )


def _envelope(facts: Facts, usage: Usage) -> dict[str, Any]:
    return {
        "id": f"msg_{facts.id}",
        "type": "message",
        "role": "assistant",
        "model": facts.model,
        "content": [],
        "container": None,
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "usage": _input(usage)
        | {
            "output_tokens": usage.completion,
            "output_tokens_details": None,
            "cache_creation": None,
            "server_tool_use": None,
            "service_tier": "standard",
            "inference_geo": None,
        },
    }


def _input(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what the cache had apart from the rest of the prompt."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
    }


def _reason(finish: str | None, stopped_by: str, usage: Usage, facts: Facts, shape: Shape, called: bool) -> str:
    """Anthropic's word for why the answer ended."""
    if finish == "length" and facts.context and usage.completion < shape.limit:
        full = usage.prompt + usage.completion >= facts.context - 1
        return "model_context_window_exceeded" if full else "max_tokens"
    if finish == "stop" and called:
        return "tool_use"
    if finish == "stop" and stopped_by:
        return "stop_sequence"
    return _REASONS.get(finish or "", "end_turn")


def _tool_use(id: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": given, "caller": {"type": "direct"}}


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; what is no JSON object is kept as text, as the client can say more about it."""
    try:
        return _arguments(arguments)
    except (msgspec.MsgspecError, RecursionError):
        return {"arguments": arguments}


def _call_id(given: str, facts: Facts, number: int) -> str:
    if given.startswith("toolu_"):
        return given
    return f"toolu_{given}" if given else f"toolu_{facts.id}_{number}"


def signature(thought: str) -> str:
    """What clients hand back with a thinking block; a digest of its text, and nothing depends on it."""
    return base64.b64encode(hashlib.blake2b(thought.encode(), digest_size=24).digest()).decode()


class Events:
    """The stream: one block after the other, each opened when its first piece comes."""

    def __init__(self, facts: Facts, shape: Shape) -> None:
        self._facts = facts
        self._shape = shape
        self._begun = False
        self._open = ""  # the kind of the block under way
        self._index = -1
        self._call = -1  # the engine's index of the call under way
        self._thought: list[str] = []
        self._finish: str | None = None
        self._stopped_by = ""
        self._called = False

    def feed(self, chunk: chat.Chunk) -> bytes:
        """What one chunk of the engine becomes."""
        out: list[bytes] = []
        if not self._begun:
            self._begin(chunk, out)
        elif chunk.prompt_progress is not None:
            out.append(_PING)
        self._stopped_by = chunk.stopped_by or self._stopped_by
        choice = chunk.first
        if choice is not None:
            self._finish = choice.finish_reason or self._finish
            if choice.delta is not None:
                self._delta(choice.delta, out)
        return b"".join(out)

    def _begin(self, chunk: chat.Chunk, out: list[bytes]) -> None:
        self._begun = True
        progress = chunk.prompt_progress
        usage = Usage(progress.total, 0, progress.cache, True) if progress is not None else NOTHING
        out.append(chat.event("message_start", {"type": "message_start", "message": _envelope(self._facts, usage)}))
        out.append(_PING)

    def _delta(self, delta: chat.Message, out: list[bytes]) -> None:
        thought = delta.thought
        if thought:
            self._switch("thinking", {"type": "thinking", "thinking": "", "signature": ""}, out)
            self._thought.append(thought)
            if not self._shape.hides:
                self._piece({"type": "thinking_delta", "thinking": thought}, out)
        text = delta.content or delta.refusal
        if text:
            self._switch("text", {"type": "text", "text": "", "citations": None}, out)
            self._piece({"type": "text_delta", "text": text}, out)
        for call in delta.tool_calls or ():
            self._tool(call, out)

    def _tool(self, call: chat.ToolCall, out: list[bytes]) -> None:
        function = call.function or chat.Function()
        if self._open != "tool_use" or call.index != self._call:
            self._close(out)
            self._call, self._called = call.index, True
            id = _call_id(call.id or "", self._facts, call.index)
            self._switch("tool_use", _tool_use(id, function.name or "", {}), out)
        if function.arguments:
            self._piece({"type": "input_json_delta", "partial_json": function.arguments}, out)

    def _switch(self, kind: str, block: dict[str, Any], out: list[bytes]) -> None:
        if self._open == kind:
            return
        self._close(out)
        self._open = kind
        self._index += 1
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        out.append(chat.event("content_block_start", start))

    def _piece(self, delta: dict[str, Any], out: list[bytes]) -> None:
        piece = {"type": "content_block_delta", "index": self._index, "delta": delta}
        out.append(chat.event("content_block_delta", piece))

    def _close(self, out: list[bytes]) -> None:
        if self._open == "thinking":
            text, self._thought = "".join(self._thought), []
            self._piece({"type": "signature_delta", "signature": signature(text)}, out)
        if self._open:
            stop = {"type": "content_block_stop", "index": self._index}
            out.append(chat.event("content_block_stop", stop))
        self._open = ""

    def end(self, usage: Usage) -> bytes:
        """The last events, with the usage as the engine counted it."""
        out: list[bytes] = []
        if not self._begun:
            self._begin(chat.Chunk(), out)
        self._close(out)
        reason = _reason(self._finish, self._stopped_by, usage, self._facts, self._shape, self._called)
        stop = self._stopped_by or None
        delta = {"container": None, "stop_reason": reason, "stop_sequence": stop, "stop_details": None}
        told = _input(usage) | {"output_tokens": usage.completion}
        out.append(chat.event("message_delta", {"type": "message_delta", "delta": delta, "usage": told}))
        out.append(chat.event("message_stop", {"type": "message_stop"}))
        return b"".join(out)
