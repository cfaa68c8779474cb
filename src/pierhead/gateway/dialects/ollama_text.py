"""Text for Ollama's clients: ``/api/chat`` and ``/api/generate`` to an OpenAI engine, its answer as NDJSON; pure."""

from __future__ import annotations

from typing import Any

import msgspec

from pierhead.gateway.dialects import ollama_request as requests
from pierhead.gateway.dialects.base import NDJSON, Facts, Keep, Reply, Save, Send, Steps
from pierhead.gateway.dialects.ollama_chunks import Clock, Tools, chunks, finished, probabilities
from pierhead.gateway.dialects.ollama_context import Said, packed, unpacked
from pierhead.gateway.faults import Fault, bad_request
from pierhead.gateway.usage import Usage

_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_PLAIN = "{{ .Prompt }}"  # the one template that means none


class _Text:
    """What both share: a clock, the text so far, and how a record looks."""

    kind = NDJSON
    saves: tuple[Save, ...] = ()
    field = "message"

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._clock = Clock(facts)
        self._tools = Tools()
        self._reason = "stop"
        self._text: list[str] = []
        self._timings: dict[str, float] = {}
        self._keeps_text = False

    # --- records --------------------------------------------------------------------------------------------------

    def _record(self, text: str, thought: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError

    def _head(self) -> dict[str, Any]:
        return {"model": self._facts.model, "created_at": self._clock.stamp()}

    def _ready(self, reason: str) -> Reply:
        """The answer to an empty request, which only loads (or unloads) the model."""
        record = {**self._head(), **self._record("", "", []), "done": True, "done_reason": reason}
        return Reply(msgspec.json.encode(record))

    def _last(self, usage: Usage) -> dict[str, Any]:
        return {"done": True, "done_reason": self._reason, **self._clock.figures(usage, self._timings)}

    # --- the answer -----------------------------------------------------------------------------------------------

    def events(self, data: bytes) -> bytes:
        lines: list[bytes] = []
        for chunk in chunks(data):
            self._clock.came()
            self._timings = chunk.timings or self._timings
            self._reason = finished(chunk) or self._reason
            text, thought, shown = chunk.text, chunk.thought, probabilities(chunk)
            self._tools.add(chunk)
            if text or thought or shown:
                lines.append(self._line(text, thought, [], shown))
        return b"".join(lines)

    def _line(self, text: str, thought: str, calls: list[dict[str, Any]], shown: list[dict[str, Any]]) -> bytes:
        if self._keeps_text:
            self._text.append(text)
        record = {**self._head(), **self._record(text, thought, calls), "done": False}
        if shown:
            record["logprobs"] = shown
        return msgspec.json.encode(record) + b"\n"

    def end(self, usage: Usage) -> bytes:
        calls, rest = self._tools.finish()
        lines = self._line(rest, "", calls, []) if calls or rest else b""
        record = {**self._head(), **self._record("", "", []), **self._last(usage)}
        return lines + msgspec.json.encode(record) + b"\n"

    def answer(self, body: bytes, usage: Usage) -> bytes:
        found = chunks(b"data: " + body.replace(b"\n", b" ") + b"\n\n")
        if not found:
            raise Fault(502, "engine_failed", "the engine's answer is not one that can be read.", source="engine")
        chunk = found[0]
        self._clock.came()
        self._timings = chunk.timings
        self._reason = finished(chunk) or "stop"
        self._tools.add(chunk)
        calls, rest = self._tools.finish()
        text = chunk.text + rest
        if self._keeps_text:
            self._text.append(text)
        record = {**self._head(), **self._record(text, chunk.thought, calls), **self._last(usage)}
        shown = probabilities(chunk)
        if shown:
            record["logprobs"] = shown
        return msgspec.json.encode(record)


class Chat(_Text):
    """One request of ``/api/chat``."""

    def _record(self, text: str, thought: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thought:
            message["thinking"] = thought
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def steps(self, body: bytes) -> Steps:
        self._clock.loaded()
        request = requests.decoded(body, requests.ChatRequest)
        keep = requests.seconds(request.keep_alive)
        facts = self._facts
        made = _asked(request, facts)
        made["messages"] = requests.messages(request.messages or (), facts)
        if request.tools:
            made["tools"] = request.tools
        if keep is not None:
            yield Keep(keep)
        if not request.messages:
            return self._ready("load")
        return Send("chat", msgspec.json.encode(made), request.stream is not False)


class Generate(_Text):
    """One request of ``/api/generate``: as a chat of one question, raw, or text to be filled in."""

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._said: list[Said] = []

    def _record(self, text: str, thought: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        record: dict[str, Any] = {"response": text}
        if thought:
            record["thinking"] = thought
        if calls:
            record["tool_calls"] = calls
        return record

    def _last(self, usage: Usage) -> dict[str, Any]:
        last = super()._last(usage)
        if self._keeps_text:
            last["context"] = packed([*self._said, Said("assistant", "".join(self._text))])
        return last

    def steps(self, body: bytes) -> Steps:
        self._clock.loaded()
        request = requests.decoded(body, requests.GenerateRequest)
        keep = requests.seconds(request.keep_alive)
        raw = bool(request.raw) or (request.template or "").strip() == _PLAIN
        send = self._send(request, raw)
        if keep is not None:
            yield Keep(keep)
        return send if request.prompt else self._ready("load")

    def _send(self, request: requests.GenerateRequest, raw: bool) -> Send:
        if request.template and not raw:
            raise bad_request(
                "a template cannot be given with a request: the model has its own. Make a model with another one "
                "(/api/create), or format the prompt yourself with 'raw'.",
                param="template",
            )
        if request.raw and (request.template or request.system or request.context):
            raise bad_request("raw mode does not support template, system, or context.", param="raw")
        made = _asked(request, self._facts)
        streams = request.stream is not False
        if request.suffix:
            return self._infill(request, made, streams)
        if raw:
            return self._raw(request, made, streams)
        self._keeps_text = True
        self._said = _conversation(request)
        question = {
            "role": "user",
            "content": requests.content(request.prompt or "", request.images, self._facts),
        }
        made["messages"] = [*({"role": s.role, "content": s.content} for s in self._said[:-1]), question]
        return Send("chat", msgspec.json.encode(made), streams)

    def _raw(self, request: requests.GenerateRequest, made: dict[str, Any], streams: bool) -> Send:
        self._only_text(request, "raw")
        if "completions" not in self._facts.serves:
            raise bad_request(f'"{self._facts.model}" does not support raw prompts.', param="raw")
        made["prompt"] = request.prompt
        made.pop("chat_template_kwargs", None)
        if "logprobs" in made:
            made["logprobs"] = made.pop("top_logprobs", 1)
        wanted = made.get("response_format")
        if wanted is not None and requests.llamacpp(self._facts):
            schema = wanted["json_schema"]["schema"] if "json_schema" in wanted else {"type": "object"}
            made = {k: v for k, v in made.items() if k != "response_format"} | {"json_schema": schema}
        return Send("completions", msgspec.json.encode(made), streams)

    def _infill(self, request: requests.GenerateRequest, made: dict[str, Any], streams: bool) -> Send:
        self._only_text(request, "suffix")
        if "llamacpp-infill" not in self._facts.serves or request.system or request.context or request.format:
            raise bad_request(f'"{self._facts.model}" does not support insert', param="suffix")
        made = {k: v for k, v in made.items() if k not in ("model", "stream_options", "chat_template_kwargs")}
        if "max_tokens" in made:
            made["n_predict"] = made.pop("max_tokens")
        made |= {"input_prefix": request.prompt, "input_suffix": request.suffix, "stream": streams}
        return Send("llamacpp-infill", msgspec.json.encode(made), streams)

    def _only_text(self, request: requests.GenerateRequest, what: str) -> None:
        if request.images:
            raise bad_request(f"images cannot be given together with '{what}'.", param="images")


def _asked(request: requests.Common, facts: Facts) -> dict[str, Any]:
    """The members that chats and prompts share."""
    made: dict[str, Any] = {"model": facts.model}
    if request.stream is not False:
        made |= _STREAMED
    made |= requests.settings(request.options, facts)
    made |= requests.shaped(request.format)
    made |= requests.thinking(request.think, facts)
    return made | requests.probabilities(request)


def _conversation(request: requests.GenerateRequest) -> list[Said]:
    """What was said before, with this question last."""
    said = unpacked(request.context) if request.context else []
    if request.system:
        said = [Said("system", request.system), *(s for s in said if s.role != "system")]
    return [*said, Said("user", request.prompt or "")]


def unload(body: bytes, facts: Facts) -> tuple[Keep, Reply] | None:
    """The answer to a request that wants nothing but its model unloaded: it must not start it first."""
    kind = requests.ChatRequest if facts.operation.name == "ollama-chat" else requests.GenerateRequest
    request = requests.decoded(body, kind)
    empty = not (request.messages if isinstance(request, requests.ChatRequest) else request.prompt)
    if not empty or requests.seconds(request.keep_alive) != 0:
        return None
    text = Chat(facts) if isinstance(request, requests.ChatRequest) else Generate(facts)
    return Keep(0.0), text._ready("unload")  # pyright: ignore[reportPrivateUsage]


def make(facts: Facts) -> Chat | Generate | None:
    """The translation for an engine that answers chats, or completions."""
    if "chat" in facts.serves:
        return Chat(facts) if facts.operation.name == "ollama-chat" else Generate(facts)
    return None
