"""Puts ``tool_choice`` into words that every engine understands; pure.

Engines take ``none``, ``auto`` and ``required``. OpenAI's clients also name one function, or allow some of several.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pierhead.gateway.faults import Fault

MARK = b'"tool_choice"'  # a body without it needs no second look


class _Named(msgspec.Struct):
    name: str = ""


class _Tool(msgspec.Struct):
    function: _Named = msgspec.field(default_factory=_Named)


class _Allowed(msgspec.Struct):
    mode: str = "auto"
    tools: list[_Tool] = []


class _Choice(msgspec.Struct):
    type: str = ""
    function: _Named | None = None
    allowed_tools: _Allowed | None = None


class _Message(msgspec.Struct):
    role: str = ""


class _Format(msgspec.Struct):
    type: str = ""


_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_choice = msgspec.json.Decoder(str | _Choice).decode
_tool = msgspec.json.Decoder(_Tool).decode
_message = msgspec.json.Decoder(_Message).decode
_format = msgspec.json.Decoder(_Format | None).decode


def adapt(body: bytes, call_prefix: str) -> bytes:
    """The request with a choice of functions made into fewer ``tools``; Fault 400 for a choice that cannot be kept.

    ``call_prefix`` is how an answer with a call begins where the engine's grammar alone would let the model talk
    first ("" elsewhere): a call that is required then starts with it. What is no chat request, or one whose members
    have other types than these, is returned as it is: the engine refuses it better.
    """
    try:
        members = _members(body)
        if "messages" not in members or "tool_choice" not in members:
            return body
        choice = _choice(members["tool_choice"])
        tools = _list(members["tools"]) if "tools" in members else []
        if isinstance(choice, _Choice):
            choice = _narrow(members, choice, tools)
        if choice == "required":
            _require(members, call_prefix)
    except (msgspec.MsgspecError, RecursionError):
        return body
    return msgspec.json.encode(members)


def _narrow(members: dict[str, msgspec.Raw], choice: _Choice, tools: list[msgspec.Raw]) -> str:
    """Leave only the tools that ``choice`` allows; returns the mode in one word."""
    if choice.type == "function" and choice.function is not None:
        wanted, mode = {choice.function.name}, "required"
        members["parallel_tool_calls"] = _raw(False)
    elif choice.type == "allowed_tools" and choice.allowed_tools is not None:
        wanted, mode = {t.function.name for t in choice.allowed_tools.tools}, choice.allowed_tools.mode
    else:
        raise _refusal("tool_choice must be 'none', 'auto', 'required', a function or allowed_tools.")
    kept = [tool for tool in tools if _tool(tool).function.name in wanted]
    if len(kept) < len(wanted) or not kept:
        missing = sorted(wanted - {_tool(tool).function.name for tool in kept})
        raise _refusal(f"tool_choice names {', '.join(map(repr, missing)) or 'no tool'}, which 'tools' does not have.")
    members["tools"] = _raw(kept)
    members["tool_choice"] = _raw(mode)
    return mode


def _require(members: dict[str, msgspec.Raw], call_prefix: str) -> None:
    if "tools" not in members or not _list(members["tools"]):
        raise _refusal("tool_choice asks for a call, and the request has no 'tools'.")
    messages = _list(members["messages"])
    shaped = _format(members["response_format"]) if "response_format" in members else None
    if shaped is not None and shaped.type != "text":
        return
    if not call_prefix or not messages or _message(messages[-1]).role == "assistant":
        return
    members["messages"] = _raw([*messages, _raw({"role": "assistant", "content": call_prefix})])
    members.setdefault("parallel_tool_calls", _raw(False))  # who never learnt to call does not know when to end


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _refusal(message: str) -> Fault:
    return Fault(400, "invalid_value", message, param="tool_choice")
