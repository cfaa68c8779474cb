"""Two translations in a row: a dialect that is made of chat, on what speaks Anthropic's Messages API only; pure."""

from __future__ import annotations

import dataclasses

from pierhead.gateway.dialects import to_anthropic
from pierhead.gateway.dialects.base import Facts, Failing, Make, Reply, Save, Send, Steps, Translation
from pierhead.gateway.faults import Fault
from pierhead.gateway.operations import OPERATIONS
from pierhead.gateway.usage import Usage


def through_chat(make: Make, facts: Facts) -> Translation | None:
    """The translation of an operation by way of chat; None when it is not made of that, or nothing speaks messages."""
    if "messages" not in facts.serves or facts.operation.name == "chat":
        return None
    outer = make(dataclasses.replace(facts, serves=facts.serves | {"chat"}))
    inner = to_anthropic.make(dataclasses.replace(facts, operation=OPERATIONS["chat"]))
    return Chained(outer, inner) if outer is not None and inner is not None else None


class Chained:
    """``outer`` speaks the client's dialect and chat, ``inner`` chat and the engine's."""

    def __init__(self, outer: Translation, inner: Translation) -> None:
        self._outer = outer
        self._inner = inner
        self.kind = outer.kind
        self.saves: tuple[Save, ...] = ()

    def steps(self, body: bytes) -> Steps:
        last = yield from self._outer.steps(body)
        if isinstance(last, Reply) or last.operation != "chat":
            return last
        inner = yield from self._inner.steps(last.body)
        return inner._replace(stream=last.stream) if isinstance(inner, Send) else inner

    def answer(self, body: bytes, usage: Usage) -> bytes | Reply:
        made = self._inner.answer(body, usage)
        if isinstance(made, bytes):
            made = self._outer.answer(made, usage)
        self.saves = self._outer.saves
        return made

    def events(self, data: bytes) -> bytes:
        return self._outer.events(self._inner.events(data))

    def end(self, usage: Usage) -> bytes:
        last = self._outer.events(self._inner.end(usage)) + self._outer.end(usage)
        self.saves = self._outer.saves
        return last

    def failed(self, fault: Fault) -> bytes:
        return self._outer.failed(fault) if isinstance(self._outer, Failing) else b""
