"""Classification at vLLM's own path: its shapes are those that clients use here, so bodies pass as they are; pure."""

from __future__ import annotations

from pierhead.gateway.dialects.base import JSON, Facts, Save, Send, Steps
from pierhead.gateway.usage import Usage


class Classify:
    """``/v1/classify`` for an engine that answers ``/classify``."""

    kind = JSON
    saves: tuple[Save, ...] = ()

    def steps(self, body: bytes) -> Steps:
        yield from ()
        return Send("vllm-classify", body)

    def answer(self, body: bytes, usage: Usage) -> bytes:
        return body

    def events(self, data: bytes) -> bytes:
        return b""

    def end(self, usage: Usage) -> bytes:
        return b""


def make(facts: Facts) -> Classify | None:
    """None where the engine has another way or none."""
    return Classify() if "vllm-classify" in facts.serves else None
