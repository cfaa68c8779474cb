"""Vectors for Ollama's clients: lists, cutting, dimensions and lengths."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from pierhead.gateway.ask import Ask
from pierhead.gateway.dialects.base import Call, Facts, Keep, Reply, Send
from pierhead.gateway.dialects.ollama_embed import make
from pierhead.gateway.faults import Fault
from pierhead.gateway.operations import OPERATIONS
from pierhead.gateway.usage import NOTHING

TOO_LONG = Fault(
    500, "engine_error", "input (3001 tokens) is too large to process. increase the physical batch size "
    "(current batch size: 8)", source="engine",
)  # fmt: skip


def embed(
    body: dict[str, Any], answers: list[Any], operation: str = "ollama-embed", **changes: Any
) -> tuple[Any, Send | Reply, list[Any]]:
    about = Facts(
        OPERATIONS[operation],
        Ask(model="m"),
        "m",
        "r",
        0,
        changes.pop("serves", frozenset({"embeddings", "llamacpp-tokenize", "llamacpp-props"})),
        **changes,
    )
    translation = make(about)
    assert translation is not None
    steps = translation.steps(json.dumps({"model": "m", **body}).encode())
    asked: list[Any] = []
    result: Any = None
    try:
        while True:
            step = steps.throw(result) if isinstance(result, Fault) else steps.send(result)
            asked.append(step)
            result = answers.pop(0) if isinstance(step, Call) else None
            result = result if isinstance(result, Fault) or result is None else json.dumps(result).encode()
    except StopIteration as stop:
        return translation, stop.value, asked


def vectors(*values: list[float], tokens: int = 3) -> dict[str, Any]:
    data = [{"index": i, "embedding": v} for i, v in enumerate(values)]
    return {"data": data[::-1], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def test_texts_become_vectors_of_length_one_in_their_order() -> None:
    _, reply, asked = embed({"input": ["a", "b"]}, [vectors([3.0, 4.0], [0.0, 2.0])])
    assert json.loads(asked[0].body)["input"] == ["a", "b"]
    assert isinstance(reply, Reply)
    said = json.loads(reply.body)
    assert said["embeddings"] == [[0.6, 0.8], [0.0, 1.0]]
    assert said["prompt_eval_count"] == 3
    assert said["total_duration"] > 0


def test_fewer_dimensions_are_of_length_one_too() -> None:
    _, reply, _ = embed({"input": "a", "dimensions": 2}, [vectors([3.0, 4.0, 12.0])])
    assert isinstance(reply, Reply)
    assert math.hypot(*json.loads(reply.body)["embeddings"][0]) == pytest.approx(1)
    assert len(json.loads(reply.body)["embeddings"][0]) == 2


def test_a_text_that_is_too_long_is_cut_at_the_engines_own_bound() -> None:
    long = "word " * 20
    translation, send, asked = embed({"input": [long, "ok"]}, [TOO_LONG, {"tokens": list(range(40))}], context=100)
    assert [a.operation for a in asked] == ["embeddings", "llamacpp-tokenize"]
    assert isinstance(send, Send)
    assert json.loads(send.body)["input"] == [[0, 1, 2, 3, 4, 5], "ok"]
    assert json.loads(translation.answer(json.dumps(vectors([1.0], [1.0])).encode(), NOTHING))["embeddings"]


def test_without_truncation_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(Fault, match="the input length exceeds the context length") as caught:
        embed({"input": "long " * 20, "truncate": False}, [TOO_LONG])
    assert caught.value.status == 400


def test_nothing_to_embed_only_loads_the_model() -> None:
    _, reply, asked = embed({"keep_alive": "5m"}, [])
    assert asked == [Keep(300.0)]
    assert isinstance(reply, Reply)
    assert json.loads(reply.body)["embeddings"] == []


def test_the_older_request_gets_one_vector_as_it_is() -> None:
    _, reply, _ = embed({"prompt": "a"}, [vectors([3.0, 4.0])], "ollama-embeddings")
    assert isinstance(reply, Reply)
    assert json.loads(reply.body) == {"embedding": [3.0, 4.0]}


@pytest.mark.parametrize("body", [{"input": [1]}, {"input": [""]}, {"input": "a", "dimensions": -1}, {"input": {}}])
def test_what_is_no_text_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(Fault) as caught:
        embed(body, [])
    assert caught.value.status == 400


def test_an_engine_that_makes_no_vectors_has_no_translation() -> None:
    about = Facts(OPERATIONS["ollama-embed"], Ask(model="m"), "m", "r", 0, frozenset({"chat"}))
    assert make(about) is None
