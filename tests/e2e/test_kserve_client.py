"""Triton's official HTTP client against the KServe routes of a real daemon with SmolLM2, and tokens beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from .conftest import Installation

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]
GREEDY = {"max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def client(process_home: Installation) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(process_home.address, network_timeout=60) as found:
        yield found


def texts(*values: str, name: str = "text_input", binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.array(values, dtype=np.object_), binary_data=binary)
    return made


def test_the_server_and_its_models_tell_what_they_are(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("smollm2")
    assert client.get_server_metadata()["name"] == "pierhead"
    told = client.get_model_metadata("smollm2")
    assert [t["name"] for t in told["inputs"]] == ["text_input"]
    assert [t["name"] for t in told["outputs"]] == ["text_output"]
    with pytest.raises(InferenceServerException, match="nope"):
        client.get_model_metadata("nope")


@pytest.mark.parametrize("binary", [True, False])
def test_a_batch_of_prompts_is_answered(client: triton.InferenceServerClient, binary: bool) -> None:
    wanted = [triton.InferRequestedOutput("text_output", binary_data=binary)]
    asked = [texts("1, 2, 3, 4,", "The capital of France is", binary=binary)]
    found = client.infer("smollm2", asked, outputs=wanted, request_id="7", parameters=GREEDY)
    answer = found.as_numpy("text_output")
    assert answer is not None
    assert answer.shape == (2,)
    said = [t.decode() if isinstance(t, bytes) else t for t in answer]
    assert "5" in said[0]
    assert found.get_response()["id"] == "7"


def test_without_outputs_the_client_gets_them_in_binary_form(client: triton.InferenceServerClient) -> None:
    found = client.infer("smollm2", [texts("1, 2, 3,")], parameters=GREEDY)
    answer = found.as_numpy("text_output")
    assert answer is not None
    assert b"4" in answer[0]


def test_wrong_tensors_are_refused_in_words(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="no input 'prompt'"):
        client.infer("smollm2", [texts("x", name="prompt")])
    wrong = triton.InferInput("text_input", [1], "FP32")
    wrong.set_data_from_numpy(np.zeros(1, dtype=np.float32))
    with pytest.raises(InferenceServerException, match="not BYTES"):
        client.infer("smollm2", [wrong])


def test_generate_and_its_stream_write_the_same(process_home: Installation) -> None:
    base = f"http://{process_home.address}/v2/models/smollm2"
    body = {"text_input": "1, 2, 3,", "parameters": GREEDY}
    with httpx.Client(timeout=60) as http:
        whole = http.post(f"{base}/generate", json=body).json()
        lines = http.post(f"{base}/generate_stream", json=body).text.splitlines()
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(p["text_output"] for p in parts) == whole["text_output"]
    assert whole["model_name"] == "smollm2"


def test_tokens_are_counted_in_vllms_words_and_llamacpps(process_home: Installation) -> None:
    base = f"http://{process_home.address}"
    with httpx.Client(timeout=60) as http:
        prompt = http.post(f"{base}/tokenize", json={"model": "smollm2", "prompt": "hello there"}).json()
        assert prompt["count"] == len(prompt["tokens"]) == 2
        assert prompt["max_model_len"] > 0
        messages = [{"role": "user", "content": "hello there"}]
        chat = http.post(f"{base}/tokenize", json={"model": "smollm2", "messages": messages}).json()
        assert chat["count"] > 10
        plain = http.post(f"{base}/tokenize", json={"model": "smollm2", "content": "hello there"}).json()
        assert plain["tokens"] == prompt["tokens"]
        text = http.post(f"{base}/detokenize", json={"model": "smollm2", "tokens": prompt["tokens"]}).json()
        assert text["prompt"] == "hello there"
        refused = http.post(f"{base}/v1/rerank", json={"model": "smollm2", "query": "a", "documents": ["b"]})
        assert refused.status_code == 404


def test_model_cards_say_what_models_can_do(process_home: Installation) -> None:
    card = httpx.get(f"http://{process_home.address}/v1/models/smollm2").json()
    assert {"chat", "completions", "embeddings", "tools"} <= set(card["capabilities"])
    assert "vision" not in card["capabilities"]
    assert card["context_length"] == 8192
