"""Ollama's official Python client, and LangChain's adapter for Ollama, against a real daemon and a real SmolLM2."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from langchain_core.messages import HumanMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from pydantic import BaseModel
from tests.sources.golden_ollama import OllamaModel, OllamaRegistry, ollama_registry

from .conftest import Installation

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]
SHORT = {"temperature": 0, "num_predict": 4, "seed": 1}
HI = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def client(ollama_home: Installation) -> Iterator[ollama.Client]:
    with ollama.Client(host=f"http://{ollama_home.address}") as client:
        yield client


@pytest.fixture(scope="module")
def registry() -> Iterator[OllamaRegistry]:
    """A registry that behaves like Ollama's, in a thread of its own."""
    ready: list[OllamaRegistry] = []
    started, ended = threading.Event(), threading.Event()

    async def serve() -> None:
        async with ollama_registry() as found:
            ready.append(found)
            started.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(10)
    yield ready[0]
    ended.set()
    thread.join(10)


# --- text -------------------------------------------------------------------------------------------------------------


def test_generate_answers_whole_and_as_a_stream(client: ollama.Client) -> None:
    whole = client.generate("smollm2", "Say hello.", options=SHORT)
    assert whole.done
    assert whole.done_reason in ("stop", "length")
    assert whole.response
    assert 0 < (whole.eval_count or 0) <= 4
    assert (whole.prompt_eval_count or 0) > 5
    assert 0 < (whole.eval_duration or 0) < (whole.total_duration or 0)
    assert (whole.load_duration or 0) > 0
    parts = list(client.generate("smollm2", "Say hello.", options=SHORT, stream=True))
    assert "".join(p.response for p in parts) == whole.response
    assert [p.done for p in parts[-2:]] == [False, True]
    assert parts[-1].eval_count == whole.eval_count


def test_a_conversation_goes_on_by_the_context_of_the_answer(client: ollama.Client) -> None:
    first = client.generate("smollm2", "My name is Ada.", options=SHORT)
    assert first.context
    again = client.generate("smollm2", "What is my name?", context=first.context, options=SHORT)
    assert (again.prompt_eval_count or 0) > (first.prompt_eval_count or 0)


def test_raw_prompts_and_schemas_work(client: ollama.Client) -> None:
    raw = client.generate("smollm2", "1, 2, 3, 4,", raw=True, options=SHORT)
    assert "5" in raw.response
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    shaped = client.generate("smollm2", "A number.", format=schema, options={**SHORT, "num_predict": 48})
    assert isinstance(json.loads(shaped.response)["n"], int)


def test_chat_answers_whole_and_as_a_stream(client: ollama.Client) -> None:
    whole = client.chat("smollm2:latest", HI, options=SHORT)
    assert whole.message.role == "assistant"
    parts = list(client.chat("SmolLM2", HI, options=SHORT, stream=True))
    assert "".join(p.message.content or "" for p in parts) == whole.message.content


def test_a_tool_is_called(client: ollama.Client) -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
          a: The first number.
          b: The second number.
        """
        return a + b

    messages: list[Any] = [{"role": "user", "content": "Add 2 and 3 with the tool."}]
    answer = client.chat("smollm2", messages, tools=[add], options={**SHORT, "num_predict": 12})
    assert answer.message.content or answer.message.tool_calls
    call = {"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    messages += [{"role": "assistant", "content": "", "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_name": "add", "content": "5"}]
    assert client.chat("smollm2", messages, tools=[add], options=SHORT).message.content


def test_an_answer_keeps_to_a_pydantic_models_schema(client: ollama.Client) -> None:
    class Pet(BaseModel):
        age: int

    answer = client.chat(
        "smollm2",
        [{"role": "user", "content": "The age of a dog, as JSON."}],
        format=Pet.model_json_schema(),
        options={"temperature": 0, "num_predict": 40},
    )
    assert Pet.model_validate_json(answer.message.content or "").age >= 0


def test_embeddings_come_for_one_text_and_for_many(client: ollama.Client) -> None:
    one = client.embed("smollm2", "hello")
    assert len(one.embeddings) == 1
    assert sum(x * x for x in one.embeddings[0]) == pytest.approx(1, abs=1e-3)
    many = client.embed("smollm2", ["hello", "world"], dimensions=16)
    assert [len(e) for e in many.embeddings] == [16, 16]
    assert len(client.embeddings("smollm2", "hello").embedding) == len(one.embeddings[0])
    long = client.embed("smollm2", "word " * 3000)
    assert len(long.embeddings[0]) == len(one.embeddings[0])
    with pytest.raises(ollama.ResponseError, match="exceeds the context length"):
        client.embed("smollm2", "word " * 3000, truncate=False)


async def test_the_async_client_does_the_same(ollama_home: Installation) -> None:
    async with ollama.AsyncClient(host=f"http://{ollama_home.address}") as client:
        whole = await client.chat("smollm2", HI, options=SHORT)
        parts = [p async for p in await client.generate("smollm2", "Say hello.", options=SHORT, stream=True)]
        assert whole.message.content
        assert parts[-1].done
        assert (await client.embed("smollm2", "x")).embeddings
        assert (await client.list()).models


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_langchains_adapter_runs_its_documented_examples(ollama_home: Installation) -> None:
    base = f"http://{ollama_home.address}"
    llm = ChatOllama(model="smollm2", base_url=base, temperature=0, num_predict=8, validate_model_on_init=True)
    answer = llm.invoke([("system", "You are brief."), ("human", "Say hello.")])
    assert answer.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(str(c.content) for c in llm.stream([HumanMessage("Say hello.")]))
    assert OllamaLLM(model="smollm2", base_url=base, num_predict=4).invoke("Say hello.") is not None
    vectors = OllamaEmbeddings(model="smollm2", base_url=base).embed_documents(["one", "two"])
    assert len(vectors) == 2

    class Joke(BaseModel):
        funny: bool

    shaped = ChatOllama(model="smollm2", base_url=base, temperature=0, num_predict=30).with_structured_output(Joke)
    assert isinstance(shaped.invoke("Tell a short joke."), Joke)
    del llm, shaped
    gc.collect()  # LangChain leaves its connections to the collector


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_are_listed_shown_and_seen_running(client: ollama.Client) -> None:
    client.generate("smollm2", "", keep_alive="10m")
    listed = next(m for m in client.list().models if m.model == "smollm2:latest")
    assert listed.size is not None
    assert listed.size > 90_000_000
    assert listed.details is not None
    assert listed.details.quantization_level == "Q4_1"
    assert listed.details.parameter_size == "134.52M"
    shown = client.show("smollm2")
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192
    assert shown.modelinfo["general.parameter_count"] == 134_515_008
    assert {"completion", "tools"} <= set(shown.capabilities or ())
    assert "im_start" in (shown.template or "")
    running = client.ps().models[0]
    assert running.model == "smollm2:latest"
    assert running.size is not None
    assert running.size > 90_000_000
    assert running.expires_at is not None
    assert 500 < running.expires_at.timestamp() - time.time() < 700


def test_a_keys_scopes_hold_for_what_is_listed_and_shown(ollama_home: Installation) -> None:
    base = f"http://{ollama_home.address}/api"
    for scope, seen in (("smol*", True), ("ai%2F%2A", False)):
        headers = {"x-pierhead-models": scope}  # as the gateway tells the daemon; here a client narrows its own view
        names = [m["name"] for m in httpx.get(f"{base}/tags", headers=headers).json()["models"]]
        assert ("smollm2:latest" in names) is seen
        shown = httpx.post(f"{base}/show", headers=headers, json={"model": "smollm2"})
        assert shown.status_code == (200 if seen else 404)


def test_a_model_that_is_not_here_is_a_404_in_ollamas_words(client: ollama.Client) -> None:
    for ask in (
        lambda: client.generate("nope", "x"),
        lambda: client.chat("nope", HI),
        lambda: client.show("nope"),
        lambda: client.delete("nope"),
        lambda: client.copy("nope", "other"),
    ):
        with pytest.raises(ollama.ResponseError, match="model 'nope' not found") as caught:
            ask()
        assert caught.value.status_code == 404


def test_a_model_is_pulled_from_a_registry_like_ollamas(
    client: ollama.Client, registry: OllamaRegistry, smollm2: Path
) -> None:
    weights = smollm2.read_bytes()
    params = json.dumps({"temperature": 0, "num_predict": 5}).encode()
    registry.models["library/tiny:1m"] = OllamaModel([("model", weights), ("system", b"Be brief."), ("params", params)])
    name = f"{registry.base}/library/tiny:1m"
    seen = list(client.pull(name, stream=True))
    assert seen[0].status == "pulling manifest"
    assert seen[-1].status == "success"
    heavy = [s for s in seen if s.total == len(weights)]
    assert heavy[-1].completed == len(weights)
    assert heavy[-1].digest == "sha256:" + hashlib.sha256(weights).hexdigest()
    assert client.pull(name).status == "success"
    assert client.show(name).parameters is not None
    assert client.generate(name, "Say hello.").response
    client.delete(name)
    with pytest.raises(ollama.ResponseError):
        client.pull(f"{registry.base}/library/none:1m")


def test_a_model_is_made_of_another_copied_and_removed(client: ollama.Client) -> None:
    statuses = [
        s.status
        for s in client.create(
            "brief",
            from_="smollm2",
            system="Answer with one word.",
            parameters={"temperature": 0, "num_predict": 3, "stop": ["\n"], "num_ctx": 1024},
            license="MIT",
            stream=True,
        )
    ]
    assert statuses[-1] == "success"
    shown = client.show("brief")
    assert "num_predict" in (shown.parameters or "")
    assert shown.license == "MIT"
    assert "Answer with one word." in (shown.modelfile or "")
    assert (client.chat("brief", HI).eval_count or 0) <= 3
    client.copy("brief", "briefer")
    assert {"brief:latest", "briefer:latest"} <= {m.model for m in client.list().models}
    client.delete("briefer")
    client.delete("brief")
    assert not {"brief:latest", "briefer:latest"} & {m.model for m in client.list().models}


def test_a_model_is_made_of_a_file_that_the_client_sends(client: ollama.Client, smollm2: Path) -> None:
    digest = client.create_blob(smollm2)
    assert digest == "sha256:" + hashlib.sha256(smollm2.read_bytes()).hexdigest()
    assert client.create("sent", files={"model.gguf": digest}).status == "success"
    assert client.generate("sent", "Say hello.", options=SHORT).response
    client.delete("sent")
    with pytest.raises(ollama.ResponseError, match="quantize is not supported"):
        client.create("q", from_="smollm2", quantize="q4_K_M")


def test_a_new_file_streams_into_the_store_and_a_wrong_one_leaves_nothing(ollama_home: Installation) -> None:
    data = os.urandom(1 << 20) * 80  # more than the gateway takes of any other body
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    url = f"http://{ollama_home.address}/api/blobs/"
    with httpx.Client(timeout=60) as http:
        assert http.head(url + digest).status_code == 404
        assert http.post(url + digest, content=iter([data[:1000], data[1000:]])).status_code == 201
        assert http.head(url + digest).status_code == 200
        assert http.post(url + digest, content=data).status_code == 200
        wrong = "sha256:" + "0" * 64
        answer = http.post(url + wrong, content=b"x" * 100_000)
        assert answer.status_code == 400
        assert "digest mismatch" in answer.json()["error"]
        assert http.head(url + wrong).status_code == 404
        assert http.post(url + "sha256:junk", content=b"x").status_code == 400


def test_a_model_is_pushed_to_a_registry_and_pulled_again(client: ollama.Client) -> None:
    place = os.environ.get("PIERHEAD_TEST_REGISTRY")
    if not place:
        pytest.skip("no registry: PIERHEAD_TEST_REGISTRY is unset")
    name = f"{place}/tests/pushed:v1"
    client.copy("smollm2", name)
    seen = list(client.push(name, stream=True))
    assert seen[-1].status == "success"
    assert any(s.total and s.completed == s.total for s in seen)
    client.delete(name)
    assert client.pull(name).status == "success"
    client.delete(name)
    with pytest.raises(ollama.ResponseError, match="does not name a place"):
        client.push("smollm2")


def test_the_probes_of_ollamas_clients_find_somebody(ollama_home: Installation) -> None:
    base = f"http://{ollama_home.address}"
    assert httpx.head(base).status_code == 200
    assert httpx.get(base).text == "Pierhead is running"
    assert httpx.get(f"{base}/api/version").json()["version"].startswith("0.13.")


def test_an_empty_request_unloads_the_model(client: ollama.Client) -> None:
    client.generate("smollm2", "", keep_alive="5m")
    assert client.ps().models
    gone = client.generate("smollm2", "", keep_alive=0)
    assert gone.done_reason == "unload"
    deadline = time.monotonic() + 20
    while any(m.model == "smollm2:latest" for m in client.ps().models):
        assert time.monotonic() < deadline
    assert client.generate("smollm2", "", keep_alive=0).done_reason == "unload"
    assert not client.ps().models
