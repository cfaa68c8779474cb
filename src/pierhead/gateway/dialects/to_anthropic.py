"""Chat on engines and providers that speak Anthropic's Messages API only, and their answers as chat's; pure."""

from __future__ import annotations

from typing import Any

import msgspec

from pierhead.gateway.dialects.base import SSE, Facts, Save, Send, Steps, Translation
from pierhead.gateway.dialects.members import Members, invalid, read
from pierhead.gateway.dialects.to_anthropic_answer import Events, completion
from pierhead.gateway.dialects.to_anthropic_content import conversation
from pierhead.gateway.usage import Usage

_encode = msgspec.json.Encoder().encode
_LIMIT = 4096  # tokens of an answer where the client sets no limit; Anthropic's API wants one
_NOT_THERE = "has no equal in Anthropic's API."
_EFFORTS = {"none": "", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high"}


def make(facts: Facts) -> Translation | None:
    """Chat, of what answers messages."""
    return Chat(facts) if "messages" in facts.serves else None


class Chat:
    """One chat request."""

    kind = SSE
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._events = Events(facts, tells_usage=False)

    def steps(self, body: bytes) -> Steps:
        yield from ()
        request = read(body)
        stream = bool(request.flag("stream"))
        options = request.inner("stream_options")
        tells = bool(options.flag("include_usage")) if options is not None else False
        if options is not None:
            options.ignore("include_obfuscation")
            options.done()
        self._events = Events(self._facts, tells_usage=tells)
        made = messages_request(request, self._facts)
        if stream:
            made["stream"] = True
        return Send("messages", _encode(made), stream)

    def answer(self, body: bytes, usage: Usage) -> bytes:
        return completion(body, usage, self._facts)

    def events(self, data: bytes) -> bytes:
        return self._events.feed(data)

    def end(self, usage: Usage) -> bytes:
        return self._events.end()


def messages_request(request: Members, facts: Facts) -> dict[str, Any]:
    """The request in Anthropic's words; Fault 400 for what these cannot say."""
    request.ignore("model")
    system, messages = conversation(request)
    made: dict[str, Any] = {"model": facts.model, "max_tokens": _limit(request, facts), "messages": messages}
    if system:
        made["system"] = system
    _sampling(request, made)
    _tools(request, made)
    _output(request, made)
    words = request.inner("chat_template_kwargs")  # which translations of other dialects add
    if words is not None and words.flag("enable_thinking") is False:
        made["thinking"] = {"type": "disabled"}
    user = request.text("user") or request.text("safety_identifier")
    if user:
        made["metadata"] = {"user_id": user}
    if request.whole("n", 1) not in (None, 1):
        raise invalid("n", "several answers at once are not offered by Anthropic's API.")
    request.choice("service_tier", "auto", "default")
    request.choice("verbosity", "medium")
    modalities = request.array("modalities")
    if modalities not in (None, ["text"]):
        raise invalid("modalities", "only text is answered here.")
    # Hints for caching and speed, and labels for OpenAI's own store: an answer is the same without them.
    request.ignore("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prediction", "metadata")
    request.refuse(
        _NOT_THERE, "logprobs", "top_logprobs", "logit_bias", "seed", "presence_penalty", "frequency_penalty"
    )
    request.refuse(_NOT_THERE, "audio", "web_search_options", "store", "functions", "function_call")
    request.done()
    return made


def _limit(request: Members, facts: Facts) -> int:
    newer, older = request.whole("max_completion_tokens", 1), request.whole("max_tokens", 1)
    limit = newer if newer is not None else older
    if limit is None:
        return facts.cap or _LIMIT
    return min(limit, facts.cap) if facts.cap else limit


def _sampling(request: Members, made: dict[str, Any]) -> None:
    for name in ("temperature", "top_p"):
        value = request.number(name)
        if value is None:
            continue
        if not 0 <= value <= 1:
            raise invalid(name, "Anthropic's models take 0 to 1.")
        made[name] = value
    stop = request.any("stop")
    if isinstance(stop, str):
        stop = [stop]
    if stop is not None:
        if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):  # pyright: ignore[reportUnknownVariableType]
            raise invalid("stop", "must be a string or an array of strings.")
        made["stop_sequences"] = stop


def _tools(request: Members, made: dict[str, Any]) -> None:
    tools = [_tool(tool) for tool in request.each("tools")]
    choice = _choice(request.any("tool_choice"), tools)
    single = request.flag("parallel_tool_calls") is False
    if not tools:
        return
    made["tools"] = tools
    if choice is None and single:
        choice = {"type": "auto"}
    if choice is not None:
        made["tool_choice"] = choice | (
            {"disable_parallel_tool_use": True} if single and choice["type"] != "none" else {}
        )


def _tool(tool: Members) -> dict[str, Any]:
    tool.choice("type", "function")
    function = tool.inner("function")
    tool.done()
    if function is None:
        raise invalid(tool.place("function"), "is missing.")
    made: dict[str, Any] = {"name": function.need("name")}
    described = function.text("description")
    if described is not None:
        made["description"] = described
    made["input_schema"] = function.object("parameters") or {"type": "object", "properties": {}}
    if function.flag("strict"):
        made["strict"] = True
    function.done()
    return made


def _choice(value: Any, tools: list[dict[str, Any]]) -> dict[str, Any] | None:
    """``tool_choice``; of ``allowed_tools`` the others are taken out of ``tools``."""
    if value is None:
        return None
    if isinstance(value, str):
        kinds = {"auto": "auto", "none": "none", "required": "any"}
        if value not in kinds:
            raise invalid("tool_choice", "must be none, auto, required or name a function.")
        return {"type": kinds[value]}
    choice = Members(value, "tool_choice")
    kind = choice.choice("type", "function", "allowed_tools")
    inner = choice.inner(kind or "function")
    choice.done()
    if inner is None:
        raise invalid("tool_choice", "names no function.")
    if kind != "allowed_tools":
        return {"type": "tool", "name": inner.need("name")}
    mode = inner.choice("mode", "auto", "required")
    names = {named.need("name") for tool in inner.each("tools") if (named := tool.inner("function")) is not None}
    tools[:] = [tool for tool in tools if tool["name"] in names]
    return {"type": "any" if mode == "required" else "auto"}


def _output(request: Members, made: dict[str, Any]) -> None:
    """The schema of the answer, and how hard to think."""
    output: dict[str, Any] = {}
    wanted = request.inner("response_format")
    if wanted is not None:
        kind = wanted.choice("type", "text", "json_schema", "json_object")
        if kind == "json_object":
            raise invalid("response_format", "JSON without a schema has no equal in Anthropic's API; send json_schema.")
        described = wanted.inner("json_schema")
        wanted.done()
        if kind == "json_schema":
            schema = described.object("schema") if described is not None else None
            if schema is None:
                raise invalid("response_format.json_schema.schema", "is missing.")
            output["format"] = {"type": "json_schema", "schema": schema}
    effort = request.choice("reasoning_effort", *_EFFORTS)
    if effort == "none":
        made["thinking"] = {"type": "disabled"}
    elif effort is not None:
        output["effort"] = _EFFORTS[effort]
    if output:
        made["output_config"] = output
