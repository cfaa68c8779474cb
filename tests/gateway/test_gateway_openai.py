"""The official openai client, unmodified, through the gateway to a real llama.cpp with a real model."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from pierhead.gateway import link

pytestmark = [pytest.mark.model, pytest.mark.timeout(180)]

ENGINE = """
import sys, threading, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, embeddings = sys.argv[1], sys.argv[3] == "1"
p.n_ctx, p.n_parallel, p.hostnames, p.endpoint_metrics = 1024, 2, [sys.argv[2]], True
p.embedding = embeddings
if embeddings:
    p.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(p)
print("up", flush=True)
threading.Event().wait()
"""
ASK = [{"role": "user", "content": "Name one colour."}]


@pytest.fixture
async def real_engine(smollm2: Path, folder: Path) -> AsyncIterator[object]:
    """Start llama.cpp as a child that listens on a unix socket."""
    processes: list[asyncio.subprocess.Process] = []

    async def start(name: str, *, embeddings: bool = False) -> tuple[link.Endpoint, asyncio.subprocess.Process]:
        path = folder / f"{name}.sock"
        argv = [sys.executable, "-c", ENGINE, str(smollm2), str(path), "1" if embeddings else "0"]
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        processes.append(process)
        assert process.stdout is not None
        async with asyncio.timeout(60):
            while b"up" not in await process.stdout.readline():
                assert process.returncode is None
        return link.Endpoint(replica=name, socket=str(path)), process

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
async def client(gate, real_engine) -> AsyncIterator[openai.AsyncOpenAI]:
    """The client, its model ``smollm2`` served."""
    endpoint, gate.engine_process = await real_engine("real")
    gate.real = link.Route(name="smollm2", endpoints=(endpoint,))
    await gate.serve(gate.real)
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gate.port}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_models_chat_stream_schema_and_logprobs_work(client):
    assert "smollm2" in [m.id async for m in client.models.list()]
    chat = client.chat.completions
    whole = await chat.create(model="smollm2", messages=ASK, max_tokens=8, temperature=0, seed=1)
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 8

    deltas = []
    stream = await chat.create(model="smollm2", messages=ASK, max_tokens=8, temperature=0, seed=1, stream=True)
    async for chunk in stream:
        deltas.append(chunk.choices[0].delta.content or "")
    assert "".join(deltas) == whole.choices[0].message.content

    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    answer = await chat.create(
        model="smollm2",
        messages=ASK,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content or "")["colour"] in ("red", "blue")

    scored = await chat.create(model="smollm2", messages=ASK, max_tokens=2, logprobs=True, top_logprobs=3)
    assert scored.choices[0].logprobs is not None
    assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 3

    plain = await client.completions.create(model="smollm2", prompt="The sky is", max_tokens=4)
    assert plain.choices[0].text


async def test_tool_calls_pass_both_ways(gate, new_engine):
    tool = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c1", "type": "function", "function": {"name": "paint", "arguments": '{"x":"a"}'}}

    async def answer(request):
        asked = json.loads(request.body)
        assert (asked["tools"], asked["tool_choice"]) == ([tool], "required")
        base = {"id": "x", "created": 1, "model": "m"}
        if not asked.get("stream"):
            choice = {"index": 0, "finish_reason": "tool_calls", "message": {"role": "assistant", "tool_calls": [call]}}
            await request.json(base | {"object": "chat.completion", "choices": [choice]})
            return
        await request.sse()
        delta = {"index": 0, "finish_reason": None, "delta": {"tool_calls": [call | {"index": 0}]}}
        await request.event(base | {"object": "chat.completion.chunk", "choices": [delta]})
        await request.event(b"[DONE]")
        await request.end()

    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gate.port}/v1", api_key="none") as client:
        given = {"model": "m", "messages": ASK, "tools": [tool], "tool_choice": "required"}
        whole = await client.chat.completions.create(**given)
        assert whole.choices[0].message.tool_calls[0].function.name == "paint"
        chunks = [c async for c in await client.chat.completions.create(**given, stream=True)]
        assert chunks[0].choices[0].delta.tool_calls[0].function.arguments == '{"x":"a"}'


async def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(client):
    long = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="smollm2", messages=long)
    body = caught.value.body
    assert caught.value.code == "context_length_exceeded"
    assert body["source"] == "engine"
    assert body["n_prompt_tokens"] > body["n_ctx"]


async def test_an_unknown_model_is_a_not_found_error(client):
    with pytest.raises(openai.NotFoundError, match="pier pull nothing"):
        await client.chat.completions.create(model="nothing", messages=ASK)


async def test_embeddings_work(gate, real_engine):
    endpoint, _ = await real_engine("embed", embeddings=True)
    await gate.serve(link.Route(name="e", endpoints=(endpoint,)))
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{gate.port}/v1", api_key="none") as client:
        got = await client.embeddings.create(model="e", input=["one", "two"])
    assert len(got.data) == 2
    assert len(got.data[0].embedding) == 576


async def test_leaving_a_stream_frees_the_engine(gate, client):
    stream = await client.chat.completions.create(
        model="smollm2", messages=ASK, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()
    is_open = 1
    while is_open:
        for activity in (await gate.next(link.Report)).activity:
            is_open = activity.open
    text = (await gate.ask("GET", "/metrics")).body.decode()
    async with asyncio.timeout(20):
        while 'llamacpp:requests_processing{model="smollm2",replica="real"} 0' not in text:
            text = (await gate.ask("GET", "/metrics")).body.decode()


async def test_killing_the_engine_ends_its_stream_with_an_error_that_the_client_raises(gate, client):
    stream = await client.chat.completions.create(
        model="smollm2", messages=ASK, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    gate.engine_process.kill()
    with pytest.raises(openai.APIError, match="engine closed the connection"):
        [chunk async for chunk in stream]
