"""Limits and budgets at a real gateway: what is refused, what the engine is told, what races and kills cannot break."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from pierhead.gateway import link
from pierhead.gateway.ledger import SqliteLedger

PEPPER = b"p" * 32
KEY = "sk-one"
AUTH = {"authorization": f"Bearer {KEY}"}
FREE = (link.Price("*", 0, 0),)


def key(**grants: Any) -> link.Key:
    mac = hmac.new(PEPPER, KEY.encode(), hashlib.sha256).hexdigest()
    return link.Key(id="k1", mac=mac, grants=link.Grants(**grants))


def usage(prompt: int, completion: int) -> Callable[[Any], Awaitable[None]]:
    async def answer(call: Any) -> None:
        counts = {"prompt_tokens": prompt, "completion_tokens": completion}
        await call.json({"choices": [{"message": {"content": "x"}}], "usage": counts})

    return answer


class Asking:
    """A gateway with one engine and one key."""

    def __init__(self, gate: Any, engine: Any, chat: dict[str, Any]) -> None:
        self.gate = gate
        self.engine = engine
        self.chat = chat

    async def allow(self, *prices: link.Price, context: int = 0, **grants: Any) -> None:
        endpoint = link.Endpoint("e0", str(self.engine.path), context=context, serves=(*link.OPENAI, "messages"))
        route = link.Route(name="m", endpoints=(endpoint,))
        await self.gate.serve(route, keys=(key(**grants),), pepper=PEPPER.hex(), prices=prices)

    async def post(self, path: str = "/v1/chat/completions", **members: Any) -> Any:
        return await self.gate.ask("POST", path, self.chat | members, headers=AUTH)

    def sent(self) -> dict[str, Any]:
        return json.loads(self.engine.calls[-1].body)


@pytest.fixture
async def asking(gate: Any, new_engine: Any, chat: dict[str, Any]) -> Asking:
    return Asking(gate, await new_engine(usage(10, 5)), chat)


def code(answer: Any) -> str:
    return answer.json()["error"]["code"]


async def test_requests_per_minute_are_counted_told_and_refused_with_a_time_to_come_back(asking: Asking) -> None:
    await asking.allow(rpm=3)
    told = []
    for _ in range(3):
        got = await asking.post()
        assert got.status == 200
        assert got.headers["x-ratelimit-limit-requests"] == "3"
        assert got.headers["x-ratelimit-reset-requests"].endswith("ms")
        told.append(int(got.headers["x-ratelimit-remaining-requests"]))
    assert told == [2, 1, 0]
    refused = await asking.post()
    assert (refused.status, code(refused)) == (429, "requests_per_minute")
    assert 15 <= int(refused.headers["retry-after"]) <= 20
    await asking.allow(rpm=4)  # the counters live on under a limit that changed
    assert (await asking.post()).headers["x-ratelimit-remaining-requests"] == "0"
    assert (await asking.post()).status == 429


async def test_anthropic_clients_are_told_their_limits_in_their_words(asking: Asking) -> None:
    await asking.allow(rpm=3, tpm=10000)
    got = await asking.post("/v1/messages", max_tokens=5)
    assert got.headers["anthropic-ratelimit-requests-remaining"] == "2"
    assert got.headers["anthropic-ratelimit-tokens-limit"] == "10000"
    assert got.headers["anthropic-ratelimit-requests-reset"].endswith("Z")


async def test_tokens_per_minute_reserve_the_most_and_settle_to_the_truth(asking: Asking) -> None:
    await asking.allow(tpm=1000)
    for _ in range(3):  # each reserves more than half of it, and uses 15 tokens
        got = await asking.post(max_tokens=500)
        assert got.status == 200
    assert asking.sent()["max_tokens"] == 500
    left = int(got.headers["x-ratelimit-remaining-tokens"])
    assert left < 500
    await asking.post()
    assert 0 < asking.sent()["max_tokens"] < 1000  # no limit was given: what fits into a minute
    refused = await asking.post(messages=[{"role": "user", "content": "x" * 2000}])
    assert (refused.status, code(refused)) == (429, "tokens_per_minute")


async def test_as_many_requests_run_at_a_time_as_a_key_may(asking: Asking) -> None:
    go, come = asyncio.Event(), asyncio.Semaphore(0)

    async def slow(call: Any) -> None:
        come.release()
        await go.wait()
        await usage(1, 1)(call)

    asking.engine.handler = slow
    await asking.allow(concurrent=2)
    running = [asyncio.create_task(asking.post()) for _ in range(2)]
    for _ in running:
        await come.acquire()
    refused = await asking.post()
    assert (refused.status, code(refused)) == (429, "too_many_requests")
    assert refused.headers["retry-after"] == "1"
    go.set()
    assert [a.status for a in await asyncio.gather(*running)] == [200, 200]
    assert (await asking.post()).status == 200


async def test_every_member_by_which_an_answer_could_grow_is_bounded(asking: Asking) -> None:
    await asking.allow(budgets=(link.Budget(100_000),))
    await asking.post(max_completion_tokens=7, max_tokens=10**9, n_predict=-1)
    sent = asking.sent()
    assert sent["max_completion_tokens"] == 7
    assert 0 < sent["max_tokens"] <= 4096
    assert 0 < sent["n_predict"] <= 4096
    await asking.post(n_predict=50)
    assert (asking.sent()["n_predict"], asking.sent()["max_tokens"]) == (50, 50)
    refused = await asking.post(n=100, max_tokens=2000)  # 200,000 tokens
    assert refused.status == 200
    assert asking.sent()["max_tokens"] < 1000
    got = await asking.post("/v1/completions", prompt=["a"] * 200, max_tokens=1000)
    assert got.status == 200, got.body
    assert asking.sent()["max_tokens"] < 500


async def test_a_request_that_can_never_fit_is_refused_before_an_engine_sees_it(asking: Asking) -> None:
    await asking.allow(budgets=(link.Budget(1000),))
    refused = await asking.post(messages=[{"role": "user", "content": "x" * 2000}])
    assert (refused.status, code(refused)) == (402, "budget_exceeded")
    assert "renews" in refused.json()["error"]
    assert int(refused.headers["retry-after"]) > 0
    assert asking.engine.calls == []
    await asking.allow(budgets=(link.Budget(1000),), context=512)  # no prompt is longer than that
    assert (await asking.post(messages=[{"role": "user", "content": "x" * 2000}])).status == 200


async def test_where_the_engine_says_nothing_the_upper_bound_counts(asking: Asking) -> None:
    async def mute(call: Any) -> None:
        await call.json({"choices": []})

    asking.engine.handler = mute
    await asking.allow(budgets=(link.Budget(3100),))
    seen = [(await asking.post(max_tokens=1000)).status for _ in range(3)]
    assert seen == [200, 200, 200]  # the third is clamped to what is left
    assert asking.sent()["max_tokens"] < 500
    assert (await asking.post(max_tokens=1000)).status == 402


async def test_an_answer_that_is_an_error_costs_nothing(asking: Asking) -> None:
    async def failing(call: Any) -> None:
        await call.json({"error": {"message": "no"}}, 400)

    asking.engine.handler = failing
    await asking.allow(budgets=(link.Budget(1, "requests"),))
    for _ in range(3):
        assert (await asking.post()).status == 400
    asking.engine.handler = usage(1, 1)
    assert (await asking.post()).status == 200
    assert (await asking.post()).status == 402


async def test_what_a_translation_has_done_by_calls_alone_costs_as_much_as_any_other(asking: Asking) -> None:
    async def vectors(call: Any) -> None:
        data = [{"embedding": [0.123456789] * 1000, "index": 0}]
        await call.json({"model": "m", "usage": {"prompt_tokens": 300, "total_tokens": 300}, "data": data})

    asking.engine.handler = vectors
    await asking.allow(budgets=(link.Budget(1000),))
    seen = [(await asking.post("/api/embed", input="x" * 200)).status for _ in range(4)]
    assert seen == [200, 200, 402, 402]


async def test_a_budget_in_money_needs_a_price_and_counts_by_it(asking: Asking) -> None:
    budget = link.Budget(10_000, "usd")  # one cent
    await asking.allow(budgets=(budget,))
    refused = await asking.post(max_tokens=5)
    assert (refused.status, code(refused)) == (402, "unknown_price")
    assert "prices.toml" in refused.json()["error"]["hint"]
    await asking.allow(link.Price("m", 0, 1_000_000_000), budgets=(budget,))  # a tenth of a cent for each token
    assert (await asking.post(max_tokens=8)).status == 200  # 5 tokens: half a cent
    assert (await asking.post(max_tokens=8)).status == 402  # 8 would cost 0.8 cents, and 5 may be left at most
    assert (await asking.post(max_tokens=5)).status == 200
    assert (await asking.post(max_tokens=1)).status == 402
    await asking.allow(link.Price("m", 0, 0), budgets=(budget,))
    assert (await asking.post(max_tokens=5)).status == 200  # free is a price, too


async def test_a_streams_usage_settles_its_budget(asking: Asking) -> None:
    async def stream(call: Any) -> None:
        await call.sse()
        await call.event({"choices": [{"delta": {"content": "x"}}]})
        await call.event({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}})
        await call.event(b"[DONE]")
        await call.end()

    asking.engine.handler = stream
    await asking.allow(budgets=(link.Budget(2000),))
    for _ in range(20):  # would be 20 times a thousand, were it not for what the engine says
        got = await asking.post(stream=True, max_tokens=1000)
        assert got.status == 200


async def test_a_thousand_clients_at_once_get_exactly_the_hundred_that_there_is_budget_for(asking: Asking) -> None:
    await asking.allow(budgets=(link.Budget(100, "requests"),))
    statuses = [a.status for a in await asyncio.gather(*(asking.post() for _ in range(1000)))]
    assert (statuses.count(200), statuses.count(402)) == (100, 900)
    assert len(asking.engine.calls) == 100


async def test_a_thousand_clients_share_tokens_until_no_more_fits(asking: Asking) -> None:
    """Each reserves some 370 tokens and uses 15: others wait until it has settled, instead of being refused."""
    await asking.allow(budgets=(link.Budget(100 * 15 + 400),))
    statuses = [a.status for a in await asyncio.gather(*(asking.post(max_tokens=5) for _ in range(1000)))]
    assert statuses.count(200) + statuses.count(402) == 1000
    spent = statuses.count(200) * 15
    assert 100 * 15 <= spent <= 100 * 15 + 400
    assert len(asking.engine.calls) == statuses.count(200)


async def test_a_gateway_killed_at_any_moment_never_lets_more_through(
    new_gate: Any, new_engine: Any, chat: dict[str, Any], folder: Any
) -> None:
    """Eight gateways in a row are killed in a storm; the ninth spends what is left to the last request."""
    engine = await new_engine(usage(10, 5))
    state = folder / "state"
    state.mkdir()
    served, chance = 0, random.Random(4)

    async def one(asking: Asking) -> None:
        nonlocal served
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            served += (await asking.post()).status == 200

    for round_ in range(9):
        gate = await new_gate(extra={"state": str(state)})
        asking = Asking(gate, engine, chat)
        await asking.allow(budgets=(link.Budget(300, "requests"),))
        storm = [asyncio.create_task(one(asking)) for _ in range(40 if round_ < 8 else 400)]
        if round_ < 8:
            await asyncio.sleep(chance.random() * 0.1)
            gate.process.kill()
        await asyncio.gather(*storm)
        ledger = SqliteLedger(state / "budgets.db")
        (used,) = ledger.used("k1").values() or (0,)
        ledger.close()
        assert served <= len(engine.calls) <= used <= 300
    assert used == 300
    assert (await asking.post()).status == 402


async def test_a_gateway_that_ends_well_gives_its_slices_back(
    new_gate: Any, new_engine: Any, chat: dict[str, Any], folder: Any
) -> None:
    engine = await new_engine(usage(10, 5))
    gate = await new_gate(extra={"state": str(folder)})
    asking = Asking(gate, engine, chat)
    await asking.allow(budgets=(link.Budget(1_000_000), link.Budget(10**9, "usd", "month")))
    assert (await asking.post()).status == 402
    await asking.allow(
        link.Price("m", 1_000_000, 2_000_000), budgets=(link.Budget(10**6), link.Budget(10**9, "usd", "month"))
    )
    for _ in range(50):
        assert (await asking.post()).status == 200
    gate.process.terminate()
    await gate.process.wait()
    ledger = SqliteLedger(folder / "budgets.db")
    assert sorted(ledger.used("k1").values()) == [50 * 15, 50 * 20]
    ledger.close()


async def test_work_on_the_way_to_the_last_step_is_counted_however_the_request_ends(gate: Any, new_engine: Any) -> None:
    async def works(call: Any) -> None:
        counts = {"prompt_tokens": 9_995, "completion_tokens": 5}
        if json.loads(call.body).get("prompt") == "bad":
            await call.json({"error": {"message": "no"}}, 400)
        else:
            ranked = [{"index": 0, "relevance_score": 0.5}]
            await call.json({"choices": [{"text": "x"}], "results": ranked, "usage": counts})

    engine = await new_engine(works)
    writes = msgspec.structs.replace(engine.endpoint, serves=("completions",))
    ranks = msgspec.structs.replace(engine.endpoint, replica="r2", serves=("llamacpp-rerank",))
    made = {"m": writes, "rank": ranks, "probe": writes}
    routes = [link.Route(name=name, endpoints=(endpoint,)) for name, endpoint in made.items()]
    await gate.serve(*routes, keys=(key(tpm=240_000),), pepper=PEPPER.hex())

    async def left() -> int:
        probe = {"model": "probe", "prompt": "ok", "max_tokens": 1}
        got = await gate.ask("POST", "/v1/completions", probe, headers=AUTH)
        return int(got.headers["x-ratelimit-remaining-tokens"])

    async def cost(path: str, body: Any, status: int) -> int:
        before = await left()
        assert (await gate.ask("POST", path, body, headers=AUTH)).status == status
        return before - await left() - 10_000  # which the probe took; a little comes back meanwhile

    await left()  # from now on it is known how long its prompts are
    texts = ["a", "b", "bad"]
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [3], "data": texts}
    infer = {"inputs": [tensor], "parameters": {"max_tokens": 20}}
    assert 14_000 <= await cost("/v2/models/m/infer", infer, 400) <= 20_000
    assert (
        14_000 <= await cost("/v1/score", {"model": "rank", "text_1": ["a", "b"], "text_2": ["c", "d"]}, 200) <= 20_000
    )
