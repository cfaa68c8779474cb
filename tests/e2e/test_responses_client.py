"""The official openai client's Responses API, and its asynchronous side, against the gateway with a real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import openai
import pydantic
import pytest

if TYPE_CHECKING:
    from conftest import Installation

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Porto"]}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "name": "weather", "parameters": CITY | {"additionalProperties": False}, "strict": True}
]


STORY = "Tell me a long story of the sea."


class Tide(pydantic.BaseModel):
    """What a structured answer holds."""

    kind: Literal["ebb", "flood"]
    high: bool


@pytest.fixture(scope="module")
def client(process_home: Installation) -> Iterator[openai.OpenAI]:
    base = f"http://{process_home.address}/v1"
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def test_a_response_is_answered_and_gone_on_from(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="smollm2", instructions="Be brief.", input=STORY, max_output_tokens=8, metadata={"trip": "7"}
    )
    assert first.output_text
    assert first.status == "incomplete"
    assert first.incomplete_details is not None
    assert first.incomplete_details.reason == "max_output_tokens"
    assert first.usage is not None
    assert first.usage.output_tokens == 8

    second = client.responses.create(
        model="smollm2", input="Again?", previous_response_id=first.id, max_output_tokens=4
    )
    assert client.responses.retrieve(second.id).output_text == second.output_text
    inputs = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in inputs] == [STORY, first.output_text, "Again?"]  # type: ignore[union-attr]
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_a_stream_has_typed_events_that_add_up(client: openai.OpenAI) -> None:
    with client.responses.stream(model="smollm2", input=STORY, text_format=Tide, max_output_tokens=100) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert isinstance(final.output_parsed, Tide)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == final.output_text
    numbers = [e.sequence_number for e in events]
    assert numbers == sorted(set(numbers))


def test_a_function_is_called_and_its_output_taken(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "smollm2", "tools": TOOLS}
    with client.responses.stream(
        input="Weather in Porto?", tool_choice="required", max_output_tokens=80, **asked
    ) as stream:
        called = stream.get_final_response()
    call = called.output[0]
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Oslo", "Porto")
    output: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "17 degrees"}]
    answer = client.responses.create(
        input=output, previous_response_id=called.id, tool_choice="none", max_output_tokens=4, **asked
    )
    assert answer.output_text
    named = client.responses.create(
        input="Hello?", tool_choice={"type": "function", "name": "weather"}, max_output_tokens=80, **asked
    )
    assert [item.name for item in named.output if item.type == "function_call"] == ["weather"]


def test_an_answer_keeps_its_schema(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="smollm2", input="The tide?", text_format=Tide, max_output_tokens=100)
    assert isinstance(parsed.output_parsed, Tide)


def test_a_conversation_holds_what_was_said(client: openai.OpenAI) -> None:
    begun: Any = [{"type": "message", "role": "user", "content": "I am Ann."}]
    conversation = client.conversations.create(items=begun, metadata={"topic": "names"})
    said = client.responses.create(
        model="smollm2", input="Who am I?", conversation=conversation.id, max_output_tokens=4
    )
    items = client.conversations.items.list(conversation.id, order="asc").data
    texts = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert texts == ["I am Ann.", "Who am I?", said.output_text]
    client.conversations.delete(conversation.id)
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(conversation.id)


def test_the_tokens_of_an_input_are_counted_as_they_are_used(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="smollm2", input="Hello?")
    used = client.responses.create(model="smollm2", input="Hello?", max_output_tokens=1).usage
    assert used is not None
    assert counted.input_tokens == used.input_tokens


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="pier pull"):
        client.responses.create(model="nobody/has-this", input="x")
    for refused in ({"background": True}, {"tools": [{"type": "web_search"}]}, {"previous_response_id": "resp_no"}):
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="smollm2", input="x", **refused)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="smollm2", input="word " * 4000)
    assert caught.value.code == "context_length_exceeded"
    cut = client.responses.create(
        model="smollm2",
        input=[{"role": "user", "content": "word " * 4000}, {"role": "user", "content": "Hello?"}],
        truncation="auto",
        max_output_tokens=1,
    )
    assert cut.usage is not None
    assert cut.usage.input_tokens < 2048


async def test_the_asynchronous_client_chats_completes_embeds_and_responds(process_home: Installation) -> None:
    base = f"http://{process_home.address}/v1"
    hello: Any = [{"role": "user", "content": "Hello?"}]
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=120) as client:
        chat = await client.chat.completions.create(model="smollm2", messages=hello, max_tokens=4, stream=True)
        assert [chunk async for chunk in chat]
        parsed = await client.chat.completions.parse(
            model="smollm2", messages=hello, response_format=Tide, max_tokens=400
        )
        assert isinstance(parsed.choices[0].message.parsed, Tide)
        async with client.chat.completions.stream(model="smollm2", messages=hello, max_tokens=4) as stream:
            assert [event async for event in stream]
        assert (await client.completions.create(model="smollm2", prompt="One,", max_tokens=2)).choices[0].text
        assert len((await client.embeddings.create(model="smollm2", input="port")).data[0].embedding) == 576
        async with client.responses.stream(
            model="smollm2", input="Hello?", text_format=Tide, max_output_tokens=100
        ) as responding:
            assert isinstance((await responding.get_final_response()).output_parsed, Tide)
        assert "smollm2" in [model.id async for model in client.models.list()]
