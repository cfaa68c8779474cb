"""The response cache: for keys that ask for it, for requests that always have the same answer, and for nobody else."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from typing import Any

import pytest

from pierhead.gateway import link
from pierhead.gateway.cache import Cache, Kept
from pierhead.gateway.usage import Usage

PEPPER = b"p" * 32


def key(name: str, **grants: Any) -> link.Key:
    mac = hmac.new(PEPPER, name.encode(), hashlib.sha256).hexdigest()
    return link.Key(id=name, mac=mac, grants=link.Grants(**grants))


class Asking:
    def __init__(self, gate: Any, engine: Any, chat: dict[str, Any]) -> None:
        self.gate = gate
        self.engine = engine
        self.chat = chat | {"temperature": 0}

    async def serve(self, *keys: link.Key, replica: str = "e0", **route: Any) -> None:
        endpoint = link.Endpoint(replica, str(self.engine.path))
        await self.gate.serve(link.Route(name="m", endpoints=(endpoint,), **route), keys=keys, pepper=PEPPER.hex())

    async def post(
        self, who: str = "a", path: str = "/v1/chat/completions", h: dict[str, str] | None = None, **members: Any
    ):
        headers = {"authorization": f"Bearer {who}"} | (h or {})
        body = {name: value for name, value in (self.chat | members).items() if value is not None}
        return await self.gate.ask("POST", path, body, headers=headers)

    async def cache(self, *args: Any, **members: Any) -> str:
        got = await self.post(*args, **members)
        assert got.status == 200, got.body
        return got.headers.get("x-pierhead-cache", "")


@pytest.fixture
async def asking(gate: Any, new_engine: Any, chat: dict[str, Any]) -> Asking:
    count = 0

    async def answer(call: Any) -> None:
        nonlocal count
        count += 1
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        if json.loads(call.body).get("stream"):
            await call.sse()
            for part in ("one", "two"):
                await call.event({"choices": [{"delta": {"content": f"{part} {count}"}}]})
            await call.event({"choices": [], "usage": usage})
            await call.event(b"[DONE]")
            await call.end()
            return
        await call.json({"choices": [{"message": {"content": f"answer {count}"}}], "usage": usage})

    made = Asking(gate, await new_engine(answer), chat)
    await made.serve(key("a", cache=True), key("b", cache=True), key("plain"))
    return made


async def test_a_repeated_request_is_answered_without_an_engine_however_it_is_spelt(asking: Asking) -> None:
    first = await asking.post()
    second = await asking.post(messages=asking.chat["messages"], model="m")
    assert (first.headers["x-pierhead-cache"], second.headers["x-pierhead-cache"]) == ("miss", "hit")
    assert first.body == second.body
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    reordered = dict(reversed(list(asking.chat.items())))
    asking.chat = reordered
    assert await asking.cache() == "hit"
    assert len(asking.engine.calls) == 1


async def test_streams_are_replayed_as_streams(asking: Asking) -> None:
    first, second = await asking.post(stream=True), await asking.post(stream=True)
    assert second.headers["x-pierhead-cache"] == "hit"
    assert second.headers["content-type"] == "text/event-stream"
    assert first.body == second.body
    assert first.body.endswith(b"data: [DONE]\n\n")
    assert await asking.cache() == "miss"  # one that does not stream is another request


async def test_only_what_always_has_the_same_answer_is_kept_unless_the_client_insists(asking: Asking) -> None:
    for members, seen in (
        ({"temperature": 0.5}, ["", ""]),
        ({"temperature": None}, ["", ""]),
        ({"temperature": 1, "seed": 7}, ["miss", "hit"]),
        ({"temperature": 1, "h": {"x-pierhead-cache": "on"}}, ["miss", "hit"]),
        ({"user": "x", "h": {"x-pierhead-cache": "off"}}, ["", ""]),
        ({"user": "y", "h": {"cache-control": "no-store"}}, ["", ""]),
        ({"user": "z", "h": {"cache-control": "no-cache"}}, ["miss", "miss"]),
        ({"user": "z"}, ["hit", "hit"]),
    ):
        assert [await asking.cache(**members) for _ in range(2)] == seen, members
    assert [await asking.cache(path="/v1/embeddings", temperature=None, input="x") for _ in range(2)] == ["miss", "hit"]


async def test_nobody_gets_the_answers_of_another_key_or_of_a_model_that_has_changed(asking: Asking) -> None:
    assert [await asking.cache(who) for who in ("a", "a", "b", "plain", "plain")] == ["miss", "hit", "miss", "", ""]
    keys = (key("a", cache=True),)
    await asking.serve(*keys, docker={"id": "sha256:another"})
    assert await asking.cache() == "miss"
    await asking.serve(*keys, docker={"id": "sha256:another"}, replica="e1")
    assert await asking.cache() == "miss"


async def test_keys_share_answers_where_settings_say_so(new_gate: Any, asking: Asking) -> None:
    asking.gate = await new_gate(cache_shared=True)
    await asking.serve(key("a", cache=True), key("b", cache=True))
    assert [await asking.cache(who) for who in ("a", "b")] == ["miss", "hit"]


async def test_a_hit_takes_nothing_of_a_budget_but_counts_as_a_request(asking: Asking) -> None:
    await asking.serve(key("a", cache=True, rpm=4, budgets=(link.Budget(2, "requests"),)))
    assert [await asking.cache() for _ in range(3)] == ["miss", "hit", "hit"]
    assert await asking.cache(user="x") == "miss"
    refused = await asking.post()
    assert refused.json()["error"]["code"] == "requests_per_minute"


async def test_an_answer_that_a_budget_has_cut_short_is_not_served_to_others(new_gate: Any, asking: Asking) -> None:
    asking.gate = await new_gate(cache_shared=True)

    async def answer(call: Any) -> None:
        limit = json.loads(call.body).get("max_tokens", 2000)
        usage = {"prompt_tokens": 10, "completion_tokens": min(limit, 30)}
        await call.json({"choices": [{"message": {"content": "x " * min(limit, 30)}}], "usage": usage})

    asking.engine.handler = answer
    poor = key("poor", cache=True, budgets=(link.Budget(600, "tokens"),))
    await asking.serve(poor, key("rich", cache=True))
    assert await asking.cache("poor", max_tokens=20) == "miss"
    assert await asking.cache("rich", max_tokens=20) == "hit", "it asked for no more"
    assert await asking.cache("poor") == "miss"
    assert await asking.cache("rich") == "hit", "it ended by itself"
    for turn in range(10):  # until so little is left that answers are clamped
        got = await asking.post("poor", user=f"u{turn}")
        assert got.status == 200, got.body
        cut = got.json()["usage"]["completion_tokens"] < 30
        assert await asking.cache("rich", user=f"u{turn}") == ("miss" if cut else "hit")
        if cut:
            return
    pytest.fail("the budget cut nothing")


async def test_errors_and_answers_that_break_off_are_not_kept(asking: Asking) -> None:
    async def failing(call: Any) -> None:
        await call.json({"error": {"message": "no"}}, 400)

    async def breaking(call: Any) -> None:
        await call.sse()
        await call.event({"choices": [{"delta": {"content": "x"}}]})
        call.reset()

    good = asking.engine.handler
    for handler, stream in ((failing, False), (breaking, True)):
        asking.engine.handler = handler
        await asking.post(stream=stream)
        asking.engine.handler = good
        assert await asking.cache(stream=stream) == "miss"


def test_a_cache_keeps_within_its_size_and_age() -> None:
    cache = Cache(10_000, 10)
    now = time.monotonic()
    for n in range(20):
        cache.put(b"%d" % n, Kept(b"text/plain", b"x" * 1000, Usage(), now + n))
        cache.get(b"0", now - 1)
    assert cache.get(b"19", now) is not None
    assert cache.get(b"1", now) is None  # pushed out
    assert cache.get(b"0", now + 0.1) is None  # too old
    assert sum(cache.get(b"%d" % n, now - 1) is not None for n in range(20)) == 5
