"""Rerank, score and tokenize in the field's spellings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pierhead.gateway.ask import Ask
from pierhead.gateway.dialects import ranking, tokens
from pierhead.gateway.dialects.base import Call, Facts, Reply, Send
from pierhead.gateway.faults import Fault
from pierhead.gateway.operations import OPERATIONS
from pierhead.gateway.usage import NOTHING

RANKED = {
    "results": [{"index": 0, "relevance_score": 0.1}, {"index": 1, "relevance_score": 0.9}],
    "usage": {"prompt_tokens": 8, "total_tokens": 8},
}


def facts(operation: str, *serves: str) -> Facts:
    return Facts(OPERATIONS[operation], Ask(model="m"), "m", "r", 5, frozenset(serves), context=512)


def run(translation: Any, body: dict[str, Any], answers: list[Any] | None = None) -> tuple[Any, list[Call]]:
    steps, asked, result = translation.steps(json.dumps({"model": "m", **body}).encode()), list[Call](), None
    try:
        while True:
            asked.append(steps.send(result))
            result = json.dumps((answers or []).pop(0)).encode()
    except StopIteration as stop:
        return stop.value, asked


def test_documents_may_be_objects_and_come_back_best_first() -> None:
    translation = ranking.make(facts("rerank", "llamacpp-rerank"))
    assert translation is not None
    body = {"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1, "return_documents": True}
    send, _ = run(translation, body)
    assert isinstance(send, Send)
    assert json.loads(send.body) == {"model": "m", "query": "q", "documents": ["a", "b"]}
    said = json.loads(translation.answer(json.dumps(RANKED).encode(), NOTHING))
    assert said["results"] == [{"index": 1, "relevance_score": 0.9, "document": {"text": "b"}}]
    assert said["usage"]["total_tokens"] == 8
    assert said["meta"]["tokens"]["input_tokens"] == 8


@pytest.mark.parametrize(
    "body",
    [
        {"documents": ["a"]},
        {"query": "q", "documents": []},
        {"query": "q", "documents": [1]},
        {"query": "q", "documents": ["a"], "top_n": 0},
    ],
)
def test_a_ranking_of_nothing_is_refused(body: dict[str, Any]) -> None:
    translation = ranking.make(facts("rerank", "llamacpp-rerank"))
    assert translation is not None
    with pytest.raises(Fault) as caught:
        run(translation, body)
    assert caught.value.status == 400


def test_an_engine_that_ranks_what_is_not_there_has_failed() -> None:
    translation = ranking.make(facts("rerank", "llamacpp-rerank"))
    assert translation is not None
    run(translation, {"query": "q", "documents": ["a"]})
    with pytest.raises(Fault, match="a document that there is not"):
        translation.answer(json.dumps(RANKED).encode(), NOTHING)


def test_one_text_is_scored_against_many_and_lists_pair_by_pair() -> None:
    translation = ranking.make_score(facts("score", "rerank"))
    assert translation is not None
    reply, asked = run(translation, {"text_1": "q", "text_2": ["a", "b"]}, [RANKED])
    assert [c.operation for c in asked] == ["rerank"]
    assert isinstance(reply, Reply)
    assert [d["score"] for d in json.loads(reply.body)["data"]] == [0.1, 0.9]
    one = {"results": [{"index": 0, "relevance_score": 0.5}]}
    reply, asked = run(translation, {"text_1": ["q", "r"], "text_2": ["a", "b"]}, [one, one])
    assert [json.loads(c.body)["query"] for c in asked] == ["q", "r"]
    with pytest.raises(Fault, match="must be one text"):
        run(translation, {"text_1": ["q", "r"], "text_2": ["a"]})


def test_prompts_and_messages_become_vllms_tokens() -> None:
    translation = tokens.make(facts("tokenize", "llamacpp-tokenize", "llamacpp-template"))
    assert translation is not None
    pieces = {"tokens": [{"id": 5, "piece": "hi"}, {"id": 6, "piece": [195]}]}
    reply, asked = run(translation, {"prompt": "hi", "return_token_strs": True}, [pieces])
    assert json.loads(asked[0].body)["add_special"] is True
    said = json.loads(reply.body)
    assert said == {"count": 2, "max_model_len": 512, "tokens": [5, 6], "token_strs": ["hi", "�"]}
    messages = [{"role": "user", "content": "hi"}]
    reply, asked = run(translation, {"messages": messages}, [{"prompt": "<user>hi"}, {"tokens": [1, 2]}])
    assert [c.operation for c in asked] == ["llamacpp-template", "llamacpp-tokenize"]
    assert json.loads(asked[1].body) == {
        "content": "<user>hi", "add_special": False, "parse_special": True, "with_pieces": True
    }  # fmt: skip
    assert json.loads(reply.body)["tokens"] == [1, 2]


def test_llamacpps_own_words_pass() -> None:
    translation = tokens.make(facts("tokenize", "llamacpp-tokenize"))
    assert translation is not None
    send, _ = run(translation, {"content": "hi"})
    assert isinstance(send, Send)
    assert translation.answer(b'{"tokens":[1]}', NOTHING) == b'{"tokens":[1]}'
    with pytest.raises(Fault, match="send one of"):
        run(translation, {})


def test_tokens_become_text_in_both_words() -> None:
    translation = tokens.make_detokenize(facts("detokenize", "llamacpp-detokenize"))
    assert translation is not None
    run(translation, {"tokens": [1, 2]})
    assert json.loads(translation.answer(b'{"content":"hi"}', NOTHING)) == {"prompt": "hi", "content": "hi"}
    with pytest.raises(Fault):
        run(translation, {"tokens": ["a"]})
