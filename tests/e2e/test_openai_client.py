"""The official openai client talks to the gateway unmodified: chat, streams, embeddings, schema, tools, logprobs."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jsonschema
import openai
import pytest

if TYPE_CHECKING:
    from conftest import Installation

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

HELLO: Any = [{"role": "user", "content": "Say hello to the harbour master."}]


@pytest.fixture
def client(home: Installation) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{home.address}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def test_a_chat_is_answered_with_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=HELLO, max_tokens=16)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16
    assert answer.model == "smollm2"


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    def ask() -> str | None:
        answer = client.chat.completions.create(model="smollm2", messages=HELLO, max_tokens=16, seed=7, temperature=1)
        return answer.choices[0].message.content

    assert ask() == ask()


def test_a_streamed_chat_arrives_in_many_pieces_and_ends_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smollm2", messages=HELLO, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 3
    assert chunks[-1].usage is not None


def test_plain_completions_work(client: openai.OpenAI) -> None:
    assert client.completions.create(model="smollm2", prompt="One, two,", max_tokens=4).choices[0].text


def test_embeddings_of_like_sentences_are_closer_than_of_unlike_ones(client: openai.OpenAI) -> None:
    texts = ["A boat enters the harbour.", "A ship sails into port.", "def f(x): return x ** 2"]
    reply = client.embeddings.create(model="smollm2", input=texts)
    a, b, c = (item.embedding for item in reply.data)

    def cosine(x: list[float], y: list[float]) -> float:
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        return dot / (sum(p * p for p in x) * sum(q * q for q in y)) ** 0.5

    assert len(a) == 576
    assert cosine(a, b) > cosine(a, c)


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"port": {"type": "string", "maxLength": 20}, "ships": {"type": "integer", "maximum": 99}},
        "required": ["port", "ships"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smollm2",
        messages=HELLO,
        max_tokens=400,
        response_format={"type": "json_schema", "json_schema": {"name": "harbour", "schema": schema, "strict": True}},
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)


def test_tools_are_taken_and_every_call_fits_its_schema(client: openai.OpenAI) -> None:
    parameters: dict[str, object] = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Porto"]}},
        "required": ["city"],
    }
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the weather in Porto?"}],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
        max_tokens=400,  # the grammar lets a call be padded with up to some 150 blanks
        temperature=0,
    )
    message = answer.choices[0].message
    assert message.content or message.tool_calls  # whether it calls is the model's choice
    for call in message.tool_calls or ():
        assert call.type == "function"
        assert call.function.name == "weather"
        jsonschema.validate(json.loads(call.function.arguments), parameters)


def test_a_tool_call_can_be_required_streamed_and_answered(client: openai.OpenAI) -> None:
    # SmolLM2's own chat template knows no tools.
    def tool(name: str, **properties: object) -> Any:
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    tools = [
        tool("weather", city={"type": "string", "enum": ["Oslo", "Porto"]}),
        tool("tide", hour={"type": "integer"}),
    ]
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Porto?"}]
    asked: dict[str, Any] = {"model": "smollm2", "tools": tools, "max_tokens": 120, "temperature": 0}
    message = client.chat.completions.create(messages=messages, tool_choice="required", **asked).choices[0].message
    assert message.tool_calls
    assert not message.content
    for call in message.tool_calls:
        assert call.type == "function"
        wanted = next(t["function"]["parameters"] for t in tools if t["function"]["name"] == call.function.name)
        jsonschema.validate(json.loads(call.function.arguments), wanted)

    named: Any = {"type": "function", "function": {"name": "tide"}}
    stream = client.chat.completions.create(messages=messages, tool_choice=named, stream=True, **asked)
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    pieces = [piece.function for c in chunks for piece in c.delta.tool_calls or () if piece.function]
    assert [p.name for p in pieces if p.name] == ["tide"]
    assert isinstance(json.loads("".join(p.arguments or "" for p in pieces))["hour"], int)
    assert chunks[-1].finish_reason == "tool_calls"

    first = message.tool_calls[0]
    messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": first.id, "content": "17 °C"}]
    assert client.chat.completions.create(messages=messages, **asked).choices[0].message.content

    with pytest.raises(openai.BadRequestError, match="'dive'"):
        client.chat.completions.create(
            messages=messages, tool_choice={"type": "function", "function": {"name": "dive"}}, **asked
        )


def test_log_probabilities_come_with_the_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert all(t.logprob <= 0 and len(t.top_logprobs) == 3 for t in logprobs.content)


def test_a_stream_that_is_closed_frees_the_engine(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="smollm2", messages=HELLO, max_tokens=1800, stream=True)
    next(iter(stream))
    stream.close()
    answer = client.with_options(timeout=30).chat.completions.create(model="smollm2", messages=HELLO, max_tokens=4)
    assert answer.choices


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "word " * 4000}])
    body: Any = caught.value.body
    assert body["code"] == "context_length_exceeded"
    assert body["source"] == "engine"
    assert "2048" in body["message"]


def test_a_model_that_is_not_pulled_names_the_command(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody/has-this", messages=HELLO)
    body: Any = caught.value.body
    assert body["code"] == "model_not_found"
    assert "pier pull" in body["message"]


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert "smollm2" in [m.id for m in client.models.list()]
    assert client.models.retrieve("smollm2").object == "model"


@pytest.mark.parametrize("base", ["/engines/v1", "/engines/llama.cpp/v1"])
def test_the_paths_of_docker_model_runner_answer_too(home: Installation, base: str) -> None:
    with openai.OpenAI(base_url=f"http://{home.address}{base}", api_key="none", max_retries=0) as client:
        assert client.chat.completions.create(model="smollm2", messages=HELLO, max_tokens=2).choices
    with urllib.request.urlopen(f"http://{home.address}/models", timeout=10) as reply:
        assert any("smollm2" in tag for entry in json.load(reply) for tag in entry["tags"])


def test_metrics_count_tokens_and_time_to_first_token(client: openai.OpenAI, home: Installation) -> None:
    client.chat.completions.create(model="smollm2", messages=HELLO, max_tokens=4, stream=True).close()
    with urllib.request.urlopen(f"http://{home.address}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    assert "time_to_first_token" in text
    assert 'model="smollm2"' in text
    assert "llamacpp:" in text
