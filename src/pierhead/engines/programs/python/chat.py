"""``chat`` and ``complete`` behind OpenAI's routes, whole and in pieces; the gateway makes other dialects of them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, cast

from fastapi import FastAPI, Response
from pydantic import BaseModel, ConfigDict

from .answers import events, whole
from .calls import Calls
from .faults import Fault
from .model import Method, Model

_OURS = ("model", "messages", "prompt", "stream", "stream_options", "n")


class ChatRequest(BaseModel):
    """What is asked: messages, and any further members of OpenAI's that the model's method takes by name."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    model: str = ""
    messages: list[dict[str, Any]]
    stream: bool = False
    stream_options: dict[str, Any] | None = None


class CompletionRequest(BaseModel):
    """What is asked: a text to go on with, and further members as with a chat."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    model: str = ""
    prompt: str | list[str]
    stream: bool = False
    stream_options: dict[str, Any] | None = None


def add_chat(app: FastAPI, model: Model, calls: Calls, method: Method) -> None:
    """``/v1/chat/completions``."""

    async def handle(body: ChatRequest) -> Response:
        if not body.messages:
            raise Fault(422, "invalid_input", "messages: there is none", "messages")
        made = pieces(calls, method, [body.messages], options(body, method))
        answer = Chat(model.settings.name)
        if not body.stream:
            async for piece in made:
                answer.take(piece)
            return whole(answer.whole())
        counted = bool((body.stream_options or {}).get("include_usage"))
        return await events(answer.chunks(made, counted))

    _route(app, "/v1/chat/completions", handle, method)


def add_complete(app: FastAPI, model: Model, calls: Calls, method: Method) -> None:
    """``/v1/completions``."""

    async def handle(body: CompletionRequest) -> Response:
        prompt = body.prompt if isinstance(body.prompt, str) else "".join(body.prompt[:1])
        if not isinstance(body.prompt, str) and len(body.prompt) != 1:
            raise Fault(422, "invalid_input", "prompt: this model goes on with one text at a time", "prompt")
        made = pieces(calls, method, [prompt], options(body, method))
        answer = Text(model.settings.name)
        if not body.stream:
            async for piece in made:
                answer.take(piece)
            return whole(answer.whole())
        return await events(answer.chunks(made, bool((body.stream_options or {}).get("include_usage"))))

    _route(app, "/v1/completions", handle, method)


def _route(app: FastAPI, path: str, handle: Any, method: Method) -> None:
    handle.__annotations__ = {"body": ChatRequest if "chat" in path else CompletionRequest, "return": Response}
    about = method.call.__doc__ or None
    app.add_api_route(path, handle, methods=["POST"], summary=method.name.capitalize(), description=about)


def options(body: BaseModel, method: Method) -> dict[str, Any]:
    """The further members that the method has a place for; null means that nothing was said."""
    given = {k: v for k, v in (body.model_extra or {}).items() if k not in _OURS and v is not None}
    if "max_completion_tokens" in given:
        given.setdefault("max_tokens", given["max_completion_tokens"])
    taken = method.takes(given)
    return taken if method.open else {k: v for k, v in taken.items() if k != next(iter(method.arguments))}


async def pieces(calls: Calls, method: Method, args: list[Any], named: dict[str, Any]) -> AsyncGenerator[Any]:
    """What the method says, piece by piece, also where it says all at once."""
    if method.streams:
        made = calls.stream(method.call, *args, **named)
        try:
            async for piece in made:
                yield piece
        finally:
            await made.aclose()
        return
    found = await calls.ask(method.call, *args, **named)
    if hasattr(found, "__next__"):  # a plain method that returns a generator
        async for piece in calls.stream(_generator(found)):
            yield piece
    else:
        yield found


def _generator(found: Any) -> Any:
    def make() -> Any:
        yield from found

    return make


class Chat:
    """An answer as it comes. A piece is text, a delta (``content``, ``tool_calls`` …), or a chunk of OpenAI's.

    ``usage`` and ``finish_reason`` may stand in any piece that is a dict.
    """

    object = "chat.completion"

    def __init__(self, name: str) -> None:
        self.head = {"id": f"{self.object[:4]}cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self.message: dict[str, Any] = {"role": "assistant", "content": ""}
        self.usage: dict[str, Any] | None = None
        self.finish: str | None = None

    def take(self, piece: Any) -> dict[str, Any]:
        """Add a piece to the message; the delta that it is."""
        delta = self.delta(piece)
        for name, value in delta.items():
            if name == "tool_calls":
                self.message["tool_calls"] = [*self.message.get("tool_calls", []), *value]
            elif isinstance(value, str) and name != "role":
                self.message[name] = (self.message.get(name) or "") + value
        return delta

    def delta(self, piece: Any) -> dict[str, Any]:
        """What a piece adds."""
        if isinstance(piece, str):
            return {"content": piece}
        if isinstance(piece, BaseModel):
            piece = piece.model_dump(exclude_none=True)
        if not isinstance(piece, dict):
            raise Fault(500, "model_failed", f"chat gave {type(piece).__name__}: pieces are texts or dicts")
        found = cast("dict[str, Any]", piece)
        if isinstance(found.get("usage"), dict):
            self.usage = found["usage"]
        choices: list[dict[str, Any]] = found.get("choices") or []
        if choices:
            self.finish = choices[0].get("finish_reason") or self.finish
            told: dict[str, Any] = choices[0].get("delta") or choices[0].get("message") or {}
            return {name: value for name, value in told.items() if value is not None}
        self.finish = found.get("finish_reason") or self.finish
        return {
            k: v for k, v in found.items() if k in ("content", "reasoning_content", "tool_calls", "role", "refusal")
        }

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        message = self.message
        made: list[dict[str, Any]] = message.get("tool_calls") or []
        if made:
            plain = [{name: value for name, value in call.items() if name != "index"} for call in made]
            message = {**message, "content": message["content"] or None, "tool_calls": plain}
        choice = {"index": 0, "message": message, "finish_reason": self.ending()}
        return {**self.head, "object": self.object, "choices": [choice], **self._usage()}

    def ending(self) -> str:
        """Why it ended."""
        return self.finish or ("tool_calls" if self.message.get("tool_calls") else "stop")

    def _usage(self) -> dict[str, Any]:
        if self.usage is None:
            return {}
        prompt, made = self.usage.get("prompt_tokens") or 0, self.usage.get("completion_tokens") or 0
        return {"usage": {"total_tokens": prompt + made, **self.usage}}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """One event of a stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**self.head, "object": f"{self.object}.chunk", "choices": [choice]}

    async def chunks(self, made: AsyncGenerator[Any], counted: bool) -> AsyncGenerator[dict[str, Any]]:
        """The events of a stream; ``counted`` asks for one with the usage at its end."""
        first: dict[str, Any] = {"role": "assistant"}
        try:
            async for piece in made:
                delta = self.take(piece)
                if any(delta.values()):
                    yield self.chunk({**first, **numbered(delta)})
                    first = {}
            yield self.chunk(first, self.ending())
            if counted and self.usage is not None:
                yield {**self.head, "object": f"{self.object}.chunk", "choices": [], **self._usage()}
        finally:
            await made.aclose()


def numbered(delta: dict[str, Any]) -> dict[str, Any]:
    """Tool calls in a stream bear a number."""
    if "tool_calls" not in delta:
        return delta
    return {**delta, "tool_calls": [{"index": at, **call} for at, call in enumerate(delta["tool_calls"])]}


class Text(Chat):
    """The same for a text that goes on."""

    object = "text_completion"

    def delta(self, piece: Any) -> dict[str, Any]:
        """What a piece adds."""
        if isinstance(piece, dict):
            told = cast("dict[str, Any]", piece)
            piece = {**told, "content": told["text"]} if isinstance(told.get("text"), str) else told
        return super().delta(piece)

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choice = {"index": 0, "text": self.message["content"], "finish_reason": self.ending(), "logprobs": None}
        return {**self.head, "object": self.object, "choices": [choice], **self._usage()}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """One event of a stream."""
        choice = {"index": 0, "text": delta.get("content", ""), "finish_reason": finish, "logprobs": None}
        return {**self.head, "object": self.object, "choices": [choice]}
