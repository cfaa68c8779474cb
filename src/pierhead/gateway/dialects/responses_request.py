"""A request of the Responses API as a chat request, and what its answer echoes of it; pure."""

from __future__ import annotations

from typing import Any, NamedTuple

from pierhead.gateway.dialects.base import Facts
from pierhead.gateway.dialects.members import Members, invalid

_ELSEWHERE = "exists on OpenAI's own servers only."
_INCLUDES = (
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
)


class Wish(NamedTuple):
    """A request, read. ``chat`` lacks its messages; ``echo`` is the response as far as the request alone makes it."""

    chat: dict[str, Any]
    echo: dict[str, Any]
    input: Any
    instructions: str | None
    previous: str | None
    conversation: str | None
    stream: bool
    store: bool
    summary: bool
    truncates: bool


def read_wish(request: Members, facts: Facts) -> Wish:
    """Everything but the items; Fault 400 for what cannot be expressed."""
    chat: dict[str, Any] = {"model": facts.model}
    echo: dict[str, Any] = {"model": facts.model}
    request.ignore("model")
    _refuse(request)
    given, instructions = request.any("input"), request.text("instructions")
    previous, conversation = request.text("previous_response_id"), _conversation(request)
    if previous and conversation:
        raise invalid("conversation", "cannot be combined with previous_response_id.")
    if given is None and not previous and not conversation:
        raise invalid("input", "is missing.")
    _sampling(request, chat, echo, facts)
    _tools(request, chat, echo, facts)
    _text(request, chat, echo)
    summary = _reasoning(request, chat, echo, facts)
    _labels(request, chat, echo)
    store = request.flag("store")
    stream = bool(request.flag("stream"))
    if stream:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    truncation = request.choice("truncation", "auto", "disabled") or "disabled"
    echo |= {
        "instructions": instructions,
        "previous_response_id": previous,
        "store": store is not False,
        "truncation": truncation,
        "background": False,
    }
    if conversation:
        echo["conversation"] = {"id": conversation}
    request.done()
    cuts = truncation == "auto"
    return Wish(chat, echo, given, instructions, previous, conversation, stream, store is not False, summary, cuts)


def _refuse(request: Members) -> None:
    request.refuse("answers in the background are not made here; leave it out and wait for the answer.", "background")
    request.refuse("stored prompts do not exist here; send the instructions and the input themselves.", "prompt")
    request.refuse(_ELSEWHERE, "context_management", "moderation", "background_options", "access_programs", "image")
    options = request.inner("stream_options")
    if options is not None:
        options.ignore("include_obfuscation")  # padding against listeners on the way; none is added
        options.done()


def _conversation(request: Members) -> str | None:
    value = request.any("conversation")
    if value is None or isinstance(value, str):
        return value
    inner = Members(value, "conversation")
    found = inner.need("id")
    inner.done()
    return found


def _sampling(request: Members, chat: dict[str, Any], echo: dict[str, Any], facts: Facts) -> None:
    for name, default in (("temperature", 1.0), ("top_p", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        value = request.number(name)
        echo[name] = default if value is None else value
        if value is not None:
            chat[name] = value
    limit = request.whole("max_output_tokens", 1)
    echo["max_output_tokens"] = limit
    bound = min(filter(None, (limit, facts.cap)), default=0)
    if bound:
        chat["max_tokens"] = bound
    echo["max_tool_calls"] = request.whole("max_tool_calls", 1)  # counts calls of OpenAI's own tools: there are none
    includes = request.array("include") or []
    for include in includes:
        if include not in _INCLUDES:
            raise invalid("include", f"'{str(include)[:100]}' is not understood here.")
    top = request.whole("top_logprobs", 0)
    echo["top_logprobs"] = top or 0
    if top or "message.output_text.logprobs" in includes:
        chat |= {"logprobs": True, "top_logprobs": top or 0}


def _tools(request: Members, chat: dict[str, Any], echo: dict[str, Any], facts: Facts) -> None:
    tools = [_tool(tool) for tool in request.each("tools")]
    parallel = request.flag("parallel_tool_calls")
    echo |= {"tools": tools, "parallel_tool_calls": parallel is not False}
    choice = request.any("tool_choice")
    echo["tool_choice"] = choice if choice is not None else "auto"
    if not tools:
        if choice not in (None, "auto", "none"):
            raise invalid("tool_choice", "asks for a call, and the request has no tools.")
        return
    chat["tools"] = [{"type": "function", "function": _function(tool)} for tool in tools]
    if choice is not None:
        chat["tool_choice"] = _choice(choice)
    if parallel is not None or not facts.call_prefix:
        chat["parallel_tool_calls"] = parallel is not False


def _tool(tool: Members) -> dict[str, Any]:
    kind = tool.need("type")
    if kind != "function":
        raise invalid(tool.where, f"'{kind[:100]}' runs on OpenAI's servers only; describe a function of your own.")
    made = {
        "type": "function",
        "name": tool.need("name"),
        "description": tool.text("description"),
        "parameters": tool.object("parameters"),
        "strict": tool.flag("strict"),
    }
    made["strict"] = made["strict"] is not False
    callers = tool.array("allowed_callers")
    if callers and "direct" not in callers:
        raise invalid(tool.place("allowed_callers"), _ELSEWHERE)
    tool.refuse(_ELSEWHERE, "defer_loading")
    tool.done()
    return made


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    function = {name: tool[name] for name in ("name", "description", "strict") if tool[name] is not None}
    return function | {"parameters": tool["parameters"] or {"type": "object", "properties": {}}}


def _choice(value: Any) -> Any:
    """A choice of tools in chat's words, which nest the function."""
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise invalid("tool_choice", f"'{value[:100]}' is not understood here.")
        return value
    choice = Members(value, "tool_choice")
    kind = choice.choice("type", "function", "allowed_tools")
    if kind is None:
        raise invalid("tool_choice.type", "is missing.")
    if kind == "function":
        made = _named(choice)
    else:
        mode = choice.choice("mode", "auto", "required") or "auto"
        allowed = {"mode": mode, "tools": [_named(tool) for tool in choice.each("tools")]}
        made = {"type": "allowed_tools", "allowed_tools": allowed}
    choice.done()
    return made


def _named(tool: Members) -> dict[str, Any]:
    tool.choice("type", "function")
    made = {"type": "function", "function": {"name": tool.need("name")}}
    tool.done()
    return made


def _text(request: Members, chat: dict[str, Any], echo: dict[str, Any]) -> None:
    """``text``: the format of the answer, and how wordy it shall be."""
    text = request.inner("text")
    shown: dict[str, Any] = {"format": {"type": "text"}}
    if text is not None:
        verbosity = text.choice("verbosity", "low", "medium", "high")
        if verbosity:
            chat["verbosity"] = shown["verbosity"] = verbosity
        wanted = text.inner("format")
        text.done()
        if wanted is not None:
            shown["format"] = _format(wanted, chat)
    echo["text"] = shown


def _format(wanted: Members, chat: dict[str, Any]) -> dict[str, Any]:
    kind = wanted.choice("type", "text", "json_object", "json_schema") or "text"
    shown: dict[str, Any] = {"type": kind}
    if kind == "json_schema":
        schema = wanted.object("schema")
        if schema is None:
            raise invalid(wanted.place("schema"), "is missing.")
        described = {"name": wanted.text("name") or "answer", "description": wanted.text("description")}
        shown |= described | {"schema": schema, "strict": bool(wanted.flag("strict"))}
        chat["response_format"] = {"type": kind, "json_schema": {k: v for k, v in shown.items() if k != "type" and v}}
    elif kind == "json_object":
        chat["response_format"] = {"type": kind}
    wanted.done()
    return shown


def _reasoning(request: Members, chat: dict[str, Any], echo: dict[str, Any], facts: Facts) -> bool:
    """``reasoning``: how hard to think; whether a summary is wanted."""
    wanted = request.inner("reasoning")
    shown: dict[str, Any] = {"effort": None, "summary": None}
    if wanted is not None:
        effort = wanted.choice("effort", "none", "minimal", "low", "medium", "high", "xhigh", "max")
        summary = wanted.choice("summary", "auto", "concise", "detailed")
        older = wanted.choice("generate_summary", "auto", "concise", "detailed")
        wanted.refuse(_ELSEWHERE, "context", "mode")
        wanted.done()
        shown = {"effort": effort, "summary": summary or older}
        if effort == "none":
            chat["chat_template_kwargs"] = {"enable_thinking": False}
        elif effort is not None:
            chat["reasoning_effort"] = {"minimal": "low", "xhigh": "high", "max": "high"}.get(effort, effort)
    echo["reasoning"] = shown
    return shown["summary"] is not None


def _labels(request: Members, chat: dict[str, Any], echo: dict[str, Any]) -> None:
    """What says who asks and how it is to be filed."""
    echo["metadata"] = labels(request)
    user, safety = request.text("user"), request.text("safety_identifier")
    if user or safety:
        chat["user"] = user or safety
    if user:
        echo["user"] = user
    echo["safety_identifier"] = safety
    echo["prompt_cache_key"] = request.text("prompt_cache_key")
    request.ignore("prompt_cache_retention", "prompt_cache_options")  # every engine caches prompts as it can
    request.choice("service_tier", "auto", "default", "flex", "scale", "priority")
    echo["service_tier"] = "default"


def labels(request: Members) -> dict[str, Any]:
    """``metadata``: at most 16 texts with names."""
    found = request.object("metadata") or {}
    if len(found) > 16 or not all(isinstance(value, str) for value in found.values()):
        raise invalid("metadata", "must be at most 16 texts.")
    return found
