"""The official anthropic client talks to the gateway unmodified: messages, streams, tools, counts, images, errors."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import anthropic
import jsonschema
import pydantic
import pytest

if TYPE_CHECKING:
    from conftest import Installation

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

HELLO: Any = [{"role": "user", "content": "Tell me a long story of the sea."}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Porto"]}}, "required": ["city"]}
HOUR = {"type": "object", "properties": {"hour": {"type": "integer", "maximum": 23}}, "required": ["hour"]}
TOOLS: Any = [
    {"name": "weather", "description": "The weather in a city", "input_schema": CITY},
    {"name": "tide", "description": "The tide at an hour", "input_schema": HOUR},
]


@pytest.fixture(scope="module")
def client(process_home: Installation) -> Iterator[anthropic.Anthropic]:
    base = f"http://{process_home.address}"
    with anthropic.Anthropic(base_url=base, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def test_a_message_is_answered_with_usage(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="smollm2", max_tokens=8, system="Be brief.", messages=HELLO)
    assert message.role == "assistant"
    assert message.content[0].type == "text"
    assert message.content[0].text
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 8
    assert message._request_id


async def test_the_asynchronous_client_streams_text(process_home: Installation) -> None:
    base = f"http://{process_home.address}"
    async with (
        anthropic.AsyncAnthropic(base_url=base, api_key="none", max_retries=0) as client,
        client.messages.stream(model="smollm2", max_tokens=8, messages=HELLO) as stream,
    ):
        pieces = [text async for text in stream.text_stream]
        message = await stream.get_final_message()
    assert len(pieces) > 2
    assert message.content[0].type == "text"
    assert message.content[0].text == "".join(pieces)


def test_a_stream_tells_the_size_of_the_prompt_at_its_beginning_and_its_usage_at_the_end(
    client: anthropic.Anthropic,
) -> None:
    with client.messages.create(model="smollm2", max_tokens=6, messages=HELLO, stream=True) as stream:
        events = list(stream)
    assert [e.type for e in events[:1]] == ["message_start"]
    assert [e.type for e in events[-2:]] == ["message_delta", "message_stop"]
    start: Any = events[0]
    end: Any = events[-2]
    told = [u.input_tokens + u.cache_read_input_tokens for u in (start.message.usage, end.usage)]
    assert told[0] == told[1] > 10
    assert end.usage.output_tokens == 6


def test_a_tool_is_called_streamed_and_its_result_taken(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "smollm2", "max_tokens": 80, "tools": TOOLS}
    message = client.messages.create(messages=HELLO, tool_choice={"type": "any"}, **asked)
    assert message.stop_reason == "tool_use"
    call = message.content[-1]
    assert call.type == "tool_use"
    jsonschema.validate(call.input, CITY if call.name == "weather" else HOUR)

    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "17"}]}
    answer: Any = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(messages=answer, **(asked | {"max_tokens": 4})).content

    with client.messages.stream(messages=HELLO, tool_choice={"type": "tool", "name": "tide"}, **asked) as stream:
        final = stream.get_final_message()
    assert [block.name for block in final.content if block.type == "tool_use"] == ["tide"]
    assert isinstance(final.content[-1].input["hour"], int)  # type: ignore[union-attr, index]


def test_a_schema_of_the_answer_is_kept(client: anthropic.Anthropic) -> None:
    class Tide(pydantic.BaseModel):
        kind: Literal["ebb", "flood"]
        high: bool

    # The grammar ends every answer, but may pad it with some 150 blanks first.
    parsed = client.messages.parse(model="smollm2", max_tokens=400, messages=HELLO, output_format=Tide)
    assert isinstance(parsed.parsed_output, Tide)


def test_the_count_of_tokens_is_what_the_message_will_use(client: anthropic.Anthropic) -> None:
    for extra in ({}, {"system": "Be brief."}, {"tools": TOOLS, "tool_choice": {"type": "any"}}):
        asked: dict[str, Any] = {"model": "smollm2", "messages": HELLO, **extra}
        counted = client.messages.count_tokens(**asked).input_tokens
        usage = client.messages.create(max_tokens=1, **asked).usage
        assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_stop_sequence_and_a_given_beginning(client: anthropic.Anthropic) -> None:
    begun: Any = [*HELLO, {"role": "assistant", "content": "One, two, three,"}]
    asked: dict[str, Any] = {"model": "smollm2", "max_tokens": 60, "stop_sequences": ["e", "i", "o"], "messages": begun}
    message = client.messages.create(**asked)
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence in ("e", "i", "o")
    assert "One" not in "".join(block.text for block in message.content if block.type == "text")
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().stop_sequence in ("e", "i", "o")


def picture() -> Any:
    """A small picture as a block."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\x20\x80\xc0" * 8 for _ in range(8))
    out = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    out.seek(0, io.SEEK_END)
    out.write(chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)))
    out.write(chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    data = base64.b64encode(out.getvalue()).decode()
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def test_a_picture_is_taken_by_a_model_with_eyes_and_refused_by_one_without(
    client: anthropic.Anthropic, sight: str
) -> None:
    asked: Any = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, picture()]}]
    plain = client.messages.create(model=sight, max_tokens=1, messages=[{"role": "user", "content": "What is this?"}])
    seen = client.messages.create(model=sight, max_tokens=1, messages=asked)
    words, both = (u.input_tokens + (u.cache_read_input_tokens or 0) for u in (plain.usage, seen.usage))
    assert both >= words + 16  # as many as the picture has patches
    with pytest.raises(anthropic.BadRequestError, match="image input is not supported"):
        client.messages.create(model="smollm2", max_tokens=1, messages=asked)


def test_the_models_are_listed_and_found(client: anthropic.Anthropic) -> None:
    assert "smollm2" in [model.id for model in client.models.list()]
    assert client.models.retrieve("smollm2").type == "model"


def test_errors_are_the_clients_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="pier pull"):
        client.messages.create(model="nobody/has-this", max_tokens=1, messages=HELLO)
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("nobody/has-this")
    with pytest.raises(anthropic.BadRequestError, match="mcp_servers"):
        client.beta.messages.create(model="smollm2", max_tokens=1, messages=HELLO, mcp_servers=[{"type": "url"}])  # type: ignore[list-item]
    with pytest.raises(anthropic.BadRequestError, match="exceeds the available context size") as caught:
        client.messages.create(model="smollm2", max_tokens=1, messages=[{"role": "user", "content": "word " * 4000}])
    assert caught.value.request_id
