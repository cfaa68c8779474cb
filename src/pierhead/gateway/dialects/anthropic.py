"""Anthropic's Messages API on engines that chat: the two translations, of messages and of count_tokens; pure."""

from __future__ import annotations

from typing import Any

import msgspec

from pierhead.gateway.dialects import anthropic_answer as answers
from pierhead.gateway.dialects.anthropic_request import Shape, chat_request, counted, thinking
from pierhead.gateway.dialects.base import JSON, SSE, Facts, Reply, Save, Send, Steps, Translation
from pierhead.gateway.dialects.chat import Chunks
from pierhead.gateway.dialects.counting import count
from pierhead.gateway.dialects.members import read
from pierhead.gateway.faults import Fault
from pierhead.gateway.usage import Usage

_encode = msgspec.json.Encoder().encode


def make(facts: Facts) -> Translation | None:
    """Messages, of engines that chat."""
    return Messages(facts) if "chat" in facts.serves else None


def make_count(facts: Facts) -> Translation | None:
    """count_tokens, of engines that show their template's work and their tokens."""
    counts = {"llamacpp-template", "llamacpp-tokenize"} <= facts.serves
    return CountTokens(facts) if counts else None


class Messages:
    """One message."""

    kind = SSE
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._shape = Shape()
        self._chunks = Chunks()
        self._events = answers.Events(facts, self._shape)

    def steps(self, body: bytes) -> Steps:
        yield from ()
        chat, self._shape = chat_request(read(body), self._facts)
        self._events = answers.Events(self._facts, self._shape)
        return Send("chat", _encode(chat), self._shape.stream)

    def answer(self, body: bytes, usage: Usage) -> bytes:
        return answers.message(body, usage, self._facts, self._shape)

    def events(self, data: bytes) -> bytes:
        return b"".join(map(self._events.feed, self._chunks.feed(data)))

    def end(self, usage: Usage) -> bytes:
        return b"".join(map(self._events.feed, self._chunks.rest())) + self._events.end(usage)


class CountTokens:
    """How many tokens the prompt of a message would have, exactly: the engine renders it and cuts it up."""

    kind = JSON
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def steps(self, body: bytes) -> Steps:
        request = read(body)
        chat = {"model": self._facts.model} | counted(request)
        thinking(request, chat, llamacpp=True)
        request.done()
        if _has_images(chat):
            raise Fault(501, "not_supported", "the tokens of images cannot be counted beforehand.", param="messages")
        return Reply(_encode({"input_tokens": (yield from count(chat, self._facts))}))

    def answer(self, body: bytes, usage: Usage) -> bytes:
        return body

    def events(self, data: bytes) -> bytes:
        return data

    def end(self, usage: Usage) -> bytes:
        return b""


def _has_images(chat: dict[str, Any]) -> bool:
    contents = [m["content"] for m in chat["messages"] if isinstance(m["content"], list)]
    return any(part["type"] == "image_url" for parts in contents for part in parts)
