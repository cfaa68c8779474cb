"""LangChain's adapters for OpenAI and Anthropic work with the gateway as they are documented."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pydantic
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

if TYPE_CHECKING:
    from conftest import Installation

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]
HELLO = [SystemMessage("You are brief."), HumanMessage("Tell me a long story of the sea.")]


@tool
def tide(hour: int) -> str:
    """The tide at an hour of the day."""
    return "ebb" if hour % 12 < 6 else "flood"


class Port(pydantic.BaseModel):
    """A port of call."""

    tide: Literal["ebb", "flood"]
    open: bool


def chat(home: Installation, kind: str, tokens: int = 8) -> Any:
    """One of the chat models, made as its documentation says."""
    common: dict[str, Any] = {
        "model": "smollm2",
        "max_tokens": tokens,
        "max_retries": 0,
        "api_key": "none",
        "timeout": 120,
    }
    if kind == "anthropic":
        return ChatAnthropic(base_url=f"http://{home.address}", **common)
    return ChatOpenAI(base_url=f"http://{home.address}/v1", use_responses_api=kind == "responses", **common)


KINDS = pytest.mark.parametrize("kind", ["chat", "responses", "anthropic"])


@KINDS
def test_it_invokes_and_streams(process_home: Installation, kind: str) -> None:
    model = chat(process_home, kind)
    answer = model.invoke(HELLO)
    assert isinstance(answer, AIMessage)
    assert answer.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 8
    assert len([piece for piece in model.stream(HELLO) if piece.text]) > 2


async def test_it_streams_asynchronously(process_home: Installation) -> None:
    # In one test: LangChain keeps its connections for other models, and they belong to one event loop.
    for kind in ("chat", "responses", "anthropic"):
        model = chat(process_home, kind)
        assert len([piece async for piece in model.astream(HELLO) if piece.text]) > 2


@KINDS
def test_it_calls_tools_and_takes_their_results(process_home: Installation, kind: str) -> None:
    model = chat(process_home, kind, 80)
    called = model.bind_tools([tide], tool_choice="any").invoke(HELLO)
    (call,) = called.tool_calls
    assert call["name"] == "tide"
    assert isinstance(call["args"]["hour"], int)
    result = ToolMessage(tide.invoke(call["args"]), tool_call_id=call["id"])
    assert chat(process_home, kind, 4).bind_tools([tide]).invoke([*HELLO, called, result]).usage_metadata


@pytest.mark.parametrize(("kind", "method"), [("chat", "json_schema"), ("chat", "function_calling"), ("anthropic", "")])
def test_it_gives_structured_output(process_home: Installation, kind: str, method: str) -> None:
    model = chat(process_home, kind, 400)  # a string may be long before it ends
    made = model.with_structured_output(Port, **({"method": method} if method else {})).invoke(HELLO)
    assert isinstance(made, Port)


def test_it_embeds(process_home: Installation) -> None:
    embeddings = OpenAIEmbeddings(
        model="smollm2",
        base_url=f"http://{process_home.address}/v1",
        api_key="none",  # type: ignore[arg-type]
        check_embedding_ctx_length=False,
    )
    assert len(embeddings.embed_query("port")) == 576
    assert len(embeddings.embed_documents(["port", "star"])) == 2
