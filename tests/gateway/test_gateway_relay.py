"""Requests for models: what goes to the engine, what comes back, and what happens when either side breaks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from pierhead.gateway import link


def route(engine: Any, name: str = "m", **more: Any) -> link.Route:
    return link.Route(name=name, endpoints=(engine.endpoint,), **more)


async def test_a_completion_comes_back_whole_and_the_connection_stays_open(gate, new_engine, chat, http):
    async def answer(call):
        await call.json({"id": "x", "usage": {"prompt_tokens": 3, "completion_tokens": 4}})

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire()
    for _ in range(3):
        await wire.send(http("POST", "/v1/chat/completions", chat))
        got = await wire.answer()
        assert got.status == 200
        assert got.json()["id"] == "x"
        assert got.headers["x-request-id"].startswith("req_")
    assert engine.connections == 1
    assert json.loads(engine.calls[0].body) == chat


async def test_a_stream_arrives_event_by_event(gate, new_engine, chat, http):
    go = asyncio.Event()

    async def answer(call):
        await call.sse()
        await call.event({"n": 1})
        await go.wait()
        await call.event(b"[DONE]")
        await call.end()

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", chat | {"stream": True}))
    head = await wire.head()
    assert head.headers["content-type"] == "text/event-stream"
    chunks = wire.chunks()
    assert await anext(chunks) == b'data: {"n": 1}\n\n'
    go.set()
    assert await anext(chunks) == b"data: [DONE]\n\n"
    assert [c async for c in chunks] == []


async def test_an_unknown_model_is_404_with_the_command_to_type(gate, chat):
    await gate.serve()
    got = await gate.ask("POST", "/v1/chat/completions", chat)
    assert got.status == 404
    error = got.json()["error"]
    assert error["code"] == "model_not_found"
    assert error["source"] == "gateway"
    assert "pier pull m" in error["message"]
