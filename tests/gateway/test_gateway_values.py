"""What engines would silently take for something else is refused at the gateway, in OpenAI's shape."""

from __future__ import annotations

import pytest

from pierhead.gateway import link

HI = [{"role": "user", "content": "hi"}]
CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"


@pytest.fixture
async def served(gate, new_engine):
    """A gateway with ``m``, whose vectors have 576 numbers, on an engine of llama.cpp's, and ``v`` on another."""

    async def answer(call):
        await call.json({"ok": True})

    engine = await new_engine(answer)
    work = ("chat", "completions", "embeddings")
    own = link.Endpoint("r1", str(engine.path), serves=(*work, "llamacpp-tokenize"))
    other = link.Endpoint("r2", str(engine.path), serves=work)
    await gate.serve(
        link.Route(name="m", endpoints=(own,), card={"embedding_length": 576}), link.Route(name="v", endpoints=(other,))
    )
    gate.engine = engine
    return gate


@pytest.mark.parametrize("padding", [0, 100_000])
@pytest.mark.parametrize(
    ("path", "wrong", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": HI, "stop": 5}, "stop"),
        (CHAT, {"messages": HI, "stop": ["a", 5]}, "stop"),
        (CHAT, {"messages": HI, "top_p": 7}, "top_p"),
        (CHAT, {"messages": HI, "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "a", "temperature": "warm"}, "temperature"),
        (EMBED, {"input": "a", "dimensions": 10}, "dimensions"),
        (EMBED, {"input": "a", "dimensions": "ten"}, "dimensions"),
    ],
)
async def test_a_value_that_would_be_ignored_is_refused(served, path, wrong, param, padding):
    answer = await served.ask("POST", path, {"model": "m", **wrong, "metadata": {"pad": "x" * padding}})
    assert answer.status == 400, answer.body
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param in error["message"] or "576" in error["message"]
    assert "`" not in error["message"]
    assert not served.engine.calls


@pytest.mark.parametrize("padding", [0, 100_000])
@pytest.mark.parametrize(
    ("path", "right"),
    [
        (CHAT, {"messages": HI, "temperature": 0, "top_p": 1, "stop": None}),
        (CHAT, {"messages": HI, "temperature": 1.5, "top_p": None, "stop": ["a", "b"]}),
        (EMBED, {"input": "a", "dimensions": 576}),
        (EMBED, {"model": "v", "input": "a", "dimensions": 10}),
        ("/v1/completions", {"prompt": "a", "messages": [], "dimensions": {}}),
    ],
)
async def test_what_an_engine_can_do_passes(served, path, right, padding):
    answer = await served.ask("POST", path, {"model": "m", "metadata": {"pad": "x" * padding}, **right})
    assert answer.status == 200, answer.body


async def test_after_refusals_as_many_requests_are_answered_as_before(served):
    for _ in range(40):
        assert (await served.ask("POST", EMBED, {"model": "m", "input": "a", "dimensions": 10})).status == 400
    assert (await served.ask("POST", EMBED, {"model": "m", "input": "a"})).status == 200
    text = (await served.ask("GET", "/metrics")).body.decode()
    running = [line for line in text.splitlines() if "in_flight{" in line or "open_requests{" in line]
    assert all(line.endswith((" 0", " 0.0")) for line in running), running
