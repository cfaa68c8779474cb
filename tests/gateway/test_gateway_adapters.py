"""One replica under several names, one for each of its LoRAs: what the engine is told, and what is counted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from msgspec.structs import replace

from pierhead.gateway import link

FRONT = '"cache_prompt":false,"lora":[{"id":1,"scale":0.5}],'


async def test_a_route_with_an_adapter_tells_the_engine_which_one_counts(gate: Any, new_engine: Any) -> None:
    async def answer(call: Any) -> None:
        await call.json({"choices": []})

    engine = await new_engine(answer, "r1")
    adapted = link.Route(name="m+a", endpoints=(replace(engine.endpoint, front=FRONT),))
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)), adapted)
    large = "x" * 100_000
    for body in ({"stream": False}, {"stream": True}, {"max_tokens": 5}, {"user": large}):
        asked = {"model": "m+a", "messages": [{"role": "user", "content": "hi"}], **body}
        assert (await gate.ask("POST", "/v1/chat/completions", asked)).status == 200
        told = json.loads(engine.calls[-1].body)
        assert told["lora"] == [{"id": 1, "scale": 0.5}]
        assert told["messages"] == asked["messages"]
        plain = {**asked, "model": "m"}
        assert (await gate.ask("POST", "/v1/chat/completions", plain)).status == 200
        assert "lora" not in json.loads(engine.calls[-1].body)


async def test_what_a_client_says_of_adapters_and_caches_does_not_count(gate: Any, new_engine: Any) -> None:
    """Engines take the last of two members, so one in front of the client's own would be overruled."""

    async def answer(call: Any) -> None:
        await call.json({"choices": []})

    engine = await new_engine(answer, "r1")
    await gate.serve(link.Route(name="m+a", endpoints=(replace(engine.endpoint, front=FRONT),)))
    own = '"cache_prompt":true,"lora":[{"id":0,"scale":9}],"messages":[{"role":"user","content":"hi"}]'
    escaped = own.replace("cache_p", "\\u0063ache_p").replace("lora", "lor\\u0061")
    for body in (
        f'{{"model":"m+a",{own}}}',
        f'{{"model":"m+a","user":"{"x" * 100_000}",{own}}}',
        f'{{"model":"m+a",{escaped}}}',
    ):
        assert (await gate.ask("POST", "/v1/chat/completions", body.encode())).status == 200
        members = json.loads(engine.calls[-1].body, object_pairs_hook=list)
        said = [value for name, value in members if name in ("cache_prompt", "lora")]
        assert said == [False, [[("id", 1), ("scale", 0.5)]]]
    translated = {"model": "m+a", "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}], "lora": []}
    await gate.ask("POST", "/v1/messages", translated)
    assert json.loads(engine.calls[-1].body)["lora"] == [{"id": 1, "scale": 0.5}]


async def test_requests_under_all_names_count_as_the_replicas(gate: Any, new_engine: Any) -> None:
    go = asyncio.Event()

    async def answer(call: Any) -> None:
        await go.wait()
        await call.json({"choices": []})

    engine = await new_engine(answer, "r1")
    adapted = link.Route(name="m+a", endpoints=(replace(engine.endpoint, front=FRONT),))
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)), adapted)
    body = {"messages": [{"role": "user", "content": "hi"}]}
    waiting = [
        asyncio.create_task(gate.ask("POST", "/v1/chat/completions", {**body, "model": m})) for m in ("m", "m+a")
    ]
    async with asyncio.timeout(10):
        while True:
            report = await gate.next(link.Report)
            if any((seen.replica, seen.open) == ("r1", 2) for seen in report.activity):
                break
    go.set()
    await asyncio.gather(*waiting)
