"""A request of Anthropic's Messages API as a chat request; pure."""

from __future__ import annotations

from typing import Any, NamedTuple

from pierhead.gateway.dialects import anthropic_content as content
from pierhead.gateway.dialects.base import Facts
from pierhead.gateway.dialects.chat import prefill
from pierhead.gateway.dialects.members import Members, invalid

_ELSEWHERE = "exists on Anthropic's own servers only."
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Shape(NamedTuple):
    """What the answer must know of its request: ``limit`` the most tokens, ``prefill`` the answer's given beginning.

    ``hides``: the client wants no text of the thinking.
    """

    stream: bool = False
    limit: int = 0
    prefill: str = ""
    hides: bool = False


def counted(request: Members) -> dict[str, Any]:
    """The part of a chat request that makes the prompt, of ``messages`` and of ``count_tokens``."""
    request.ignore("model", "cache_control")
    chat: dict[str, Any] = {"messages": content.messages(request)}
    _tools(request, chat)
    _output(request, chat)
    request.choice("speed", "standard")
    request.refuse(_ELSEWHERE, "container", "mcp_servers", "context_management", "inference_geo", "diagnostics")
    request.refuse(_ELSEWHERE, "user_profile_id", "workspace_id", "prefill")
    return chat


def chat_request(request: Members, facts: Facts) -> tuple[dict[str, Any], Shape]:
    """The chat request and what its answer depends on; Fault 400 for what cannot be expressed."""
    llamacpp = "llamacpp-template" in facts.serves
    chat: dict[str, Any] = {"model": facts.model} | counted(request)
    if "tools" in chat and not facts.call_prefix:
        # Anthropic's models may call several tools at once unless told not to; one that never learnt to call may not.
        chat.setdefault("parallel_tool_calls", True)
    hides = thinking(request, chat, llamacpp)
    limit = request.whole("max_tokens", 1)
    if limit is None:
        raise invalid("max_tokens", "is missing.")
    chat["max_tokens"] = limit = min(limit, facts.cap) if facts.cap else limit
    _sampling(request, chat, llamacpp)
    metadata = request.inner("metadata")
    if metadata is not None:
        user = metadata.text("user_id")
        metadata.done()
        if user:
            chat["user"] = user
    request.choice("service_tier", "auto", "standard_only")
    stream = bool(request.flag("stream"))
    if stream:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
        if llamacpp:
            chat["return_progress"] = True  # tells the prompt's size before the first token
    request.done()
    return chat, Shape(stream, limit, prefill(chat["messages"]) if llamacpp else "", hides)


def _sampling(request: Members, chat: dict[str, Any], llamacpp: bool) -> None:
    for name in ("temperature", "top_p"):
        value = request.number(name)
        if value is not None:
            if not 0 <= value <= 1:
                raise invalid(name, "must be between 0 and 1.")
            chat[name] = value
    top_k = request.whole("top_k", 0)
    if top_k is not None:
        chat["top_k"] = top_k
    stops = request.array("stop_sequences")
    if stops:
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise invalid("stop_sequences", "must be texts that are not empty.")
        chat["stop"] = stops
        if llamacpp:
            chat["verbose"] = True  # else it does not say which one it met


def _tools(request: Members, chat: dict[str, Any]) -> None:
    tools = [_tool(tool) for tool in request.each("tools")]
    if tools:
        chat["tools"] = tools
    choice = request.inner("tool_choice")
    if choice is None:
        return
    kind = choice.choice("type", "auto", "any", "tool", "none")
    if kind is None:
        raise invalid(choice.place("type"), "is missing.")
    single = choice.flag("disable_parallel_tool_use")
    if kind == "tool":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.need("name")}}
    else:
        chat["tool_choice"] = _CHOICES[kind]
    choice.done()
    if single is not None:
        chat["parallel_tool_calls"] = not single
    if not tools:
        if kind in ("any", "tool"):
            raise invalid("tool_choice", "asks for a call, and the request has no tools.")
        del chat["tool_choice"]


def _tool(tool: Members) -> dict[str, Any]:
    kind = tool.text("type") or "custom"
    if kind != "custom":
        raise invalid(tool.where, f"a tool of type '{kind[:100]}' is built into Anthropic's models; describe your own.")
    function: dict[str, Any] = {"name": tool.need("name")}
    described = tool.text("description")
    if described is not None:
        function["description"] = described
    schema = tool.object("input_schema")
    if schema is None:
        raise invalid(tool.place("input_schema"), "is missing.")
    function["parameters"] = schema
    strict = tool.flag("strict")
    if strict is not None:
        function["strict"] = strict
    examples = tool.array("input_examples")
    if examples:
        function["parameters"] = schema | {"examples": [*schema.get("examples", ()), *examples]}
    callers = tool.array("allowed_callers")
    if callers and "direct" not in callers:
        raise invalid(tool.place("allowed_callers"), _ELSEWHERE)
    tool.refuse(_ELSEWHERE, "defer_loading")
    tool.ignore("cache_control", "eager_input_streaming")
    tool.done()
    return {"type": "function", "function": function}


def _output(request: Members, chat: dict[str, Any]) -> None:
    """``output_config``: how hard to think, and the schema of the answer."""
    output = request.inner("output_config")
    if output is None:
        return
    effort = output.choice("effort", "low", "medium", "high", "xhigh", "max")
    if effort is not None:
        chat["reasoning_effort"] = "high" if effort in ("xhigh", "max") else effort
    wanted = output.inner("format")
    output.done()
    if wanted is None:
        return
    wanted.choice("type", "json_schema")
    schema = wanted.object("schema")
    wanted.done()
    if schema is None:
        raise invalid("output_config.format.schema", "is missing.")
    described = {"name": "answer", "schema": schema, "strict": True}
    chat["response_format"] = {"type": "json_schema", "json_schema": described}


def thinking(request: Members, chat: dict[str, Any], llamacpp: bool) -> bool:
    """Put ``thinking`` into the words of templates and of llama.cpp; whether its text shall stay hidden."""
    wanted = request.inner("thinking")
    if wanted is None:
        return False
    kind = wanted.choice("type", "enabled", "adaptive", "disabled")
    if kind is None:
        raise invalid("thinking.type", "is missing.")
    if kind == "enabled":
        budget = wanted.whole("budget_tokens", 1)
        if budget is None:
            raise invalid("thinking.budget_tokens", "is missing.")
        if llamacpp:
            chat["thinking_budget_tokens"] = budget
    if kind != "adaptive":
        chat["chat_template_kwargs"] = {"enable_thinking": kind == "enabled"}
    display = wanted.choice("display", "summarized", "omitted") if kind != "disabled" else None
    wanted.done()
    return display == "omitted"
