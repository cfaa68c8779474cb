"""A chat engine played by the tests of translations: what it is asked, and its answers whole and cut to pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from pierhead.gateway.ask import Ask
from pierhead.gateway.dialects.base import Call, Facts, Load, Reply, Send, Translation
from pierhead.gateway.operations import OPERATIONS

LLAMACPP = ("chat", "completions", "embeddings", "llamacpp-tokenize", "llamacpp-template", "llamacpp-props")


def make_facts(operation: str, **extra: Any) -> Facts:
    """What a translation knows, as of a request for ``m`` to llama.cpp."""
    given = {"model": "m", "id": "req_1", "created": 1700000000, "serves": frozenset(LLAMACPP), "context": 4096}
    return Facts(operation=OPERATIONS[operation], ask=Ask(model="m"), **(given | extra))


def run(translation: Translation, body: Any, answer: Callable[[Call | Load], bytes | None]) -> Send | Reply:
    """Drive the steps; ``answer`` plays the engine and the store."""
    steps = translation.steps(body if isinstance(body, bytes) else json.dumps(body).encode())
    result: bytes | None = None
    try:
        while True:
            result = answer(steps.send(result))
    except StopIteration as stop:
        return stop.value


def unasked(step: Call | Load) -> bytes:
    raise AssertionError(f"{step} was not expected")


def sse(chunks: Iterable[dict[str, Any]]) -> bytes:
    """Chunks as an engine sends them."""
    return b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks) + b"data: [DONE]\n\n"


def events(raw: bytes) -> list[dict[str, Any]]:
    """The events of a translated stream; each is named as its type says."""
    found: list[dict[str, Any]] = []
    for event in raw.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append(value)
    return found


def pieces(raw: bytes, cuts: Iterable[int]) -> list[bytes]:
    """``raw`` cut at these places."""
    places = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    return [raw[a:b] for a, b in itertools.pairwise(places)]


class Played:
    """The functions above, for tests that cannot import them."""

    facts = staticmethod(make_facts)
    run = staticmethod(run)
    unasked = staticmethod(unasked)
    sse = staticmethod(sse)
    events = staticmethod(events)
    pieces = staticmethod(pieces)


@pytest.fixture(scope="session")
def played() -> type[Played]:
    """The engine that these tests play."""
    return Played
