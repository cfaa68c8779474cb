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
