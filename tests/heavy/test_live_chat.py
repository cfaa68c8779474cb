"""What every engine that chats promises, asked of the real ones through the gateway with the official client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from tests.heavy.conftest import Installation

from pierhead.runtimes.readiness import healthy

pytestmark = pytest.mark.timeout(1500)
CONTEXT = 1024  # tokens of one request
SLOTS = 2
COUNT: list[Any] = [{"role": "user", "content": "Count from one to one hundred, in words."}]


@dataclass
class Living:
    """A model that runs, and the engine that runs it."""

    engine: str
    model: str
    socket: str
    client: openai.OpenAI

    def ask(self, tokens: int = 12, **more: Any) -> Any:
        given: Any = {"model": self.model, "messages": COUNT, "max_tokens": tokens, "temperature": 0, **more}
        if "messages" not in more:
            given.setdefault("extra_body", {"ignore_eos": True})
        return self.client.chat.completions.create(**given)


@pytest.fixture(scope="module", params=["llamacpp", "openvino", "vllm"])
def living(request: pytest.FixtureRequest, installation: Installation) -> Iterator[Living]:
    engine: str = request.param
    model = "smollm2"
    if engine != "llamacpp":
        model = f"chat-{engine}"
        folder = {"openvino": "smollm2_openvino", "vllm": "smollm2_safetensors"}[engine]
        installation.pier("package", str(request.getfixturevalue(folder)), model)
    ready = installation.start(model, engine=engine, context=CONTEXT, parallel=SLOTS)
    yield Living(engine, model, ready.socket, installation.openai)
    installation.stop(model)


def test_an_answer_has_text_a_reason_to_end_and_its_price_in_tokens(living: Living) -> None:
    answer = living.ask()
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_says_the_same_in_pieces_and_tells_its_usage_at_the_end(living: Living) -> None:
    whole = living.ask()
    chunks = list(living.ask(stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].choices == []


def test_text_ends_before_a_stop_string(living: Living) -> None:
    text: str = living.ask(24).choices[0].message.content
    stop = text.split()[3]
    answer = living.ask(24, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == text[: text.index(stop)]
    streamed = living.ask(24, stop=[stop], stream=True)
    pieces = [c.choices[0].delta.content or "" for c in streamed if c.choices]
    assert "".join(pieces) == text[: text.index(stop)]


def test_a_model_that_is_done_says_so(living: Living) -> None:
    """Which question a small model answers in few words differs by its numbers, so there are three."""
    asked = ("What is the capital of France?", "Say yes.", "What is 1 + 1?")
    answers = [living.ask(40, messages=[{"role": "user", "content": text}]) for text in asked]
    done = [a for a in answers if a.choices[0].finish_reason == "stop"]
    assert done
    for answer in done:
        assert answer.usage.completion_tokens < 40
        assert "<|im_end|>" not in answer.choices[0].message.content


def test_the_same_seed_says_the_same_and_another_something_else(living: Living) -> None:
    warm: dict[str, Any] = {"temperature": 1.5, "tokens": 24}
    first, again = (living.ask(**warm, seed=7).choices[0].message.content for _ in range(2))
    others = {living.ask(**warm, seed=n).choices[0].message.content for n in (8, 9)}
    assert first == again
    assert others != {first}


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(living: Living) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        living.ask(messages=[{"role": "user", "content": "word " * (CONTEXT + 200)}])
    assert str(CONTEXT) in str(refused.value)
    assert living.ask(2).usage.completion_tokens == 2


def test_several_at_a_time_say_what_each_says_alone(living: Living) -> None:
    def about(thing: str) -> Any:
        return living.ask(8, messages=[{"role": "user", "content": f"Tell me about the {thing}."}])

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(about, ("sun", "sea", "dog", "moon")))
    assert [a.usage.completion_tokens for a in answers] == [8] * 4
    assert len({a.choices[0].message.content for a in answers}) > 2


def test_it_is_healthy_while_it_writes(living: Living) -> None:
    stream = living.ask(200, stream=True)
    next(iter(stream))
    assert asyncio.run(healthy(living.socket, timeout=10))
    stream.close()


def test_who_goes_away_frees_the_slot(living: Living) -> None:
    """All slots are taken by answers that would take minutes; nobody waits for them once their readers are gone."""
    long: dict[str, Any] = {"tokens": 900, "stream": True, "messages": [{"role": "user", "content": "Write a novel."}]}
    streams = [living.ask(**long, extra_body={"ignore_eos": True}) for _ in range(SLOTS)]
    for stream in streams:
        next(iter(stream))
    began = time.monotonic()
    waiting = threading.Thread(target=lambda: [s.close() for s in streams])
    waiting.start()
    waiting.join(30)
    for _ in range(SLOTS):
        assert living.ask(2).usage.completion_tokens == 2
    assert time.monotonic() - began < 30
    with contextlib.suppress(openai.APIError):
        assert living.ask(2)
