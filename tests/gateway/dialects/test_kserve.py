"""The Open Inference Protocol on an OpenAI engine: tensors as JSON and in binary form, text, vectors and scores."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pierhead.gateway.ask import Ask
from pierhead.gateway.dialects import kserve, kserve_models
from pierhead.gateway.dialects.base import Call, Facts, Reply, Send
from pierhead.gateway.faults import Fault
from pierhead.gateway.operations import OPERATIONS, place
from pierhead.gateway.usage import NOTHING


def facts(*serves: str, operation: str = "infer", **changes: Any) -> Facts:
    return Facts(OPERATIONS[operation], Ask(model="m"), "m", "r", 0, frozenset(serves), **changes)


def run(translation: Any, body: bytes, answers: list[Any] | None = None) -> tuple[Send | Reply, list[Call]]:
    steps, asked, result = translation.steps(body), list[Call](), None
    try:
        while True:
            asked.append(steps.send(result))
            result = json.dumps((answers or []).pop(0)).encode()
    except StopIteration as stop:
        return stop.value, asked


def infer(*texts: str, shape: list[int] | None = None, name: str = "text_input", **more: Any) -> bytes:
    tensor = {"name": name, "shape": shape or [len(texts)], "datatype": "BYTES", "data": list(texts)}
    return json.dumps({"inputs": [tensor], **more}).encode()


def completion(text: str) -> dict[str, Any]:
    return {"choices": [{"text": text}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


def test_prompts_become_texts_in_their_order() -> None:
    translation = kserve.make(facts("completions", cap=10))
    assert translation is not None
    send, asked = run(translation, infer("a", "b", id="7", parameters={"max_tokens": 9}), [completion("A")])
    assert [json.loads(c.body)["prompt"] for c in asked] == ["a"]
    assert isinstance(send, Send)
    assert json.loads(send.body) == {"model": "m", "prompt": "b", "max_tokens": 5}
    reply = translation.answer(json.dumps(completion("B")).encode(), NOTHING)
    assert json.loads(reply.body) == {
        "model_name": "m",
        "id": "7",
        "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [2], "data": ["A", "B"]}],
    }


def test_tensors_travel_in_binary_form_both_ways() -> None:
    head = json.dumps(
        {
            "inputs": [
                {"name": "text_input", "shape": [2, 1], "datatype": "BYTES", "parameters": {"binary_data_size": 12}}
            ],
            "outputs": [{"name": "embedding", "parameters": {"binary_data": True}}],
        }
    ).encode()
    data = struct.pack("<I", 1) + b"a" + struct.pack("<I", 3) + b"bcd"
    translation = kserve.make(facts("embeddings", headers={"inference-header-content-length": str(len(head))}))
    assert translation is not None
    send, _ = run(translation, head + data)
    assert isinstance(send, Send)
    assert json.loads(send.body)["input"] == ["a", "bcd"]
    vectors = {"data": [{"index": 1, "embedding": [3.0, 4.0]}, {"index": 0, "embedding": [1.0, 2.0]}]}
    reply = translation.answer(json.dumps(vectors).encode(), NOTHING)
    cut = int(reply.headers.split(b": ")[1])
    told = json.loads(reply.body[:cut])["outputs"][0]
    assert told["shape"] == [2, 2]
    assert told["parameters"] == {"binary_data_size": 16}
    assert struct.unpack("<4f", reply.body[cut:]) == (1.0, 2.0, 3.0, 4.0)


def test_documents_are_scored_in_their_own_order() -> None:
    translation = kserve.make(facts("llamacpp-rerank"))
    assert translation is not None
    query = {"name": "query", "shape": [1], "datatype": "BYTES", "data": ["q"]}
    documents = {"name": "documents", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
    send, _ = run(translation, json.dumps({"inputs": [query, documents]}).encode())
    assert isinstance(send, Send)
    assert send.operation == "llamacpp-rerank"
    ranked = {"results": [{"index": 1, "relevance_score": 2.0}, {"index": 0, "relevance_score": 1.0}]}
    reply = translation.answer(json.dumps(ranked).encode(), NOTHING)
    assert json.loads(reply.body)["outputs"][0]["data"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (infer("a", shape=[2]), "its shape is"),
        (infer("a", shape=[-1]), "its shape is"),
        (infer(shape=[0]), "it is empty"),
        (infer("a", name="prompt"), "the model has no input 'prompt'"),
        (infer("a", parameters={"max_token": 1}), "Did you mean 'max_tokens'"),
        (infer("a", parameters={"max_tokens": "x"}), "must be a number"),
        (infer("a", outputs=[{"name": "logits"}]), "no output 'logits'"),
        (b'{"inputs":[]}', "is missing"),
        (b"[]", "cannot be used"),
        (infer("a").replace(b"BYTES", b"FP32"), "its datatype is FP32"),
        (infer("a").replace(b'["a"]', b"[1]"), "no strings"),
        (infer("a").replace(b'"data": ["a"]', b'"parameters": {"binary_data_size": 99}'), "bytes are left"),
    ],
)
def test_what_is_no_request_for_the_model_is_refused_in_words(body: bytes, word: str) -> None:
    translation = kserve.make(facts("completions"))
    assert translation is not None
    with pytest.raises(Fault) as caught:
        run(translation, body)
    assert caught.value.status == 400
    assert word in caught.value.message


@example(b"", "¹")  # a digit that is no decimal
@given(st.binary(max_size=120), st.none() | st.integers(0, 200).map(str) | st.text(max_size=4))
def test_hostile_bodies_are_refused(data: bytes, header: str | None) -> None:
    head = b'{"inputs":[{"name":"text_input","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":8}}]}'
    for body in (data, head + data):
        headers = {} if header is None else {"inference-header-content-length": header}
        translation = kserve.make(facts("completions", headers=headers))
        assert translation is not None
        status = 400
        try:
            run(translation, body)
        except Fault as fault:
            status = fault.status
        assert status == 400


def test_generate_takes_plain_json_and_streams_events() -> None:
    translation = kserve.make_generate(facts("completions", operation="generate"))
    assert translation is not None
    send, _ = run(translation, b'{"text_input":"hi","parameters":{"max_tokens":3,"stop":"x"},"id":"1"}')
    assert isinstance(send, Send)
    assert json.loads(send.body) == {"model": "m", "prompt": "hi", "max_tokens": 3, "stop": ["x"]}
    said = json.loads(translation.answer(json.dumps(completion("ho")).encode(), NOTHING))
    assert said == {"id": "1", "model_name": "m", "model_version": "1", "text_output": "ho"}
    streamed = kserve.make_generate(facts("completions", operation="generate-stream"))
    assert streamed is not None
    send, _ = run(streamed, b'{"text_input":"hi"}')
    assert isinstance(send, Send)
    assert send.stream
    events = streamed.events(b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[]}\n\ndata: [DONE]\n\n')
    assert events.startswith(b'data: {"model_name"')
    assert events.count(b"\n\n") == 1


def test_models_tell_what_they_take_and_give() -> None:
    told = kserve_models.metadata({"id": "m", "capabilities": ["embeddings"]})
    assert [t["name"] for t in told["inputs"]] == ["text_input"]
    assert told["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": [-1, -1]}]
    assert kserve_models.metadata({"id": "m"})["inputs"] == []
    assert kserve.make(facts("speech")) is None


def test_models_are_named_by_paths_with_versions_and_slashes() -> None:
    found = place("/v2/models/hf.co/org/repo:Q4/versions/1/infer")
    assert found is not None
    assert (found[0].name, found[1]) == ("infer", "hf.co/org/repo:Q4")
