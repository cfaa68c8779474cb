"""Configured routes in a real gateway: shares, conditions, stickiness, fallbacks before the first byte, shadows."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pierhead.gateway import link
from pierhead.gateway.faults import Fault
from pierhead.gateway.link import Fallback, Match, Mirror, Plan, Rule, Share
from pierhead.gateway.plans import trouble

New = Callable[..., Awaitable[Any]]
PATH = "/v1/chat/completions"
PEPPER = "00" * 32


def key(text: str, id: str) -> link.Key:
    return link.Key(id=id, mac=hmac.digest(bytes.fromhex(PEPPER), text.encode(), hashlib.sha256).hex())


def says(text: str) -> Callable[[Any], Awaitable[None]]:
    """An engine that answers ``text``, whole or as a stream."""

    async def handler(call: Any) -> None:
        if json.loads(call.body).get("stream"):
            await call.sse()
            await call.event({"choices": [{"index": 0, "delta": {"content": text}}]})
            await call.event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
            await call.event(b"[DONE]")
            await call.end()
        else:
            message = {"role": "assistant", "content": text}
            usage = {"prompt_tokens": 3, "completion_tokens": 2}
            await call.json({"choices": [{"index": 0, "message": message}], "usage": usage})

    return handler


def fails(status: int, code: str = "broken") -> Callable[[Any], Awaitable[None]]:
    async def handler(call: Any) -> None:
        await call.json({"error": {"message": "no", "code": code}}, status)

    return handler


def unscraped(handler: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """The same for requests, while scrapes of metrics are answered at once."""

    async def either(call: Any) -> None:
        await (handler(call) if call.body else call.json({}))

    return either


class Town:
    """A gateway with engines ``a``, ``b`` and ``c`` and a route named ``r``."""

    def __init__(self, gate: Any, new_engine: New) -> None:
        self.gate = gate
        self.new_engine = new_engine
        self.engines: dict[str, Any] = {}

    async def open(self, plan: Plan, keys: tuple[link.Key, ...] = (), **handlers: Any) -> None:
        for name, handler in handlers.items():
            self.engines[name] = await self.new_engine(unscraped(handler), name)
        models = [link.Route(name=n, endpoints=(e.endpoint,)) for n, e in self.engines.items()]
        extra = {"keys": keys, "pepper": PEPPER} if keys else {}
        await self.gate.serve(link.Route(name="r", plan=plan), *models, **extra)

    async def ask(self, model: str = "r", **more: Any) -> Any:
        headers = more.pop("headers", None)
        body = {"model": model, "messages": [{"role": "user", "content": more.pop("text", "hi")}]} | more
        return await self.gate.ask(
            "POST", PATH, body, headers=headers, unix=not headers or "authorization" not in headers
        )

    def bodies(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(call.body) for call in self.engines[name].calls if call.body]

    def count(self, name: str) -> int:
        return len(self.bodies(name))

    async def metric(self, start: str) -> dict[str, float]:
        lines = (await self.gate.ask("GET", "/metrics", unix=True)).body.decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(start)}


@pytest.fixture
def town(gate: Any, new_engine: New) -> Town:
    return Town(gate, new_engine)


# --- splits -----------------------------------------------------------------------------------------------------------


async def test_a_route_is_split_by_weight_and_tells_who_answered(town: Town) -> None:
    await town.open(Plan(to=(Share("a", 1), Share("b", 3))), a=says("a"), b=says("b"))
    answers = [await town.ask() for _ in range(80)]
    for answer in answers:
        assert answer.headers["x-pierhead-model"] == answer.json()["choices"][0]["message"]["content"]
    assert town.count("a") + town.count("b") == 80
    assert 5 <= town.count("a") <= 40
    assert town.bodies("a")[0]["model"] == "r"


async def test_routes_are_listed_and_hidden_models_are_not(town: Town) -> None:
    await town.open(Plan(to=(Share("a"),)), a=says("a"))
    engine = town.engines["a"].endpoint
    hidden = link.Route(name="h", endpoints=(engine,), hidden=True)
    await town.gate.serve(link.Route(name="r", plan=Plan(to=(Share("h"),)), card={"owned_by": "us"}), hidden)
    listed = (await town.gate.ask("GET", "/v1/models", unix=True)).json()["data"]
    assert {m["id"]: m["owned_by"] for m in listed}["r"] == "us"
    assert "h" not in {m["id"] for m in listed}
    assert (await town.ask("h")).status == 404
    assert (await town.ask("r")).status == 200


async def test_a_route_may_stand_in_front_of_a_model_of_its_name(town: Town) -> None:
    await town.open(Plan(to=(Share("a"),)), a=says("a"), b=says("b"))
    a, b = (link.Route(name=n, endpoints=(town.engines[n].endpoint,)) for n in "ab")
    front = link.Route(name="a", plan=Plan(to=(Share("b", 0),), fallbacks=(Fallback("a"),)))
    await town.gate.serve(front, link.Route(name="a", endpoints=a.endpoints, hidden=True), b)
    assert (await town.ask("a")).headers["x-pierhead-model"] == "a"


async def test_conditions_on_headers_and_keys_choose_the_destination(town: Town) -> None:
    keys = (key("text-1", "key_1"), key("text-2", "key_2"))
    rules = (
        Rule((Match("gold", "x-tier", True),), (Share("b"),)),
        Rule((Match("key_2"),), (Share("c"),)),
    )
    await town.open(Plan(to=(Share("a"),), rules=rules), keys, a=says("a"), b=says("b"), c=says("c"))
    assert (await town.ask()).headers["x-pierhead-model"] == "a"
    assert (await town.ask(headers={"x-tier": "golden"})).headers["x-pierhead-model"] == "b"
    assert (await town.ask(headers={"x-tier": "old"})).headers["x-pierhead-model"] == "a"
    asked = {"authorization": "Bearer text-2"}
    assert (await town.ask(headers=asked)).headers["x-pierhead-model"] == "c"
    assert (await town.ask(headers={"authorization": "Bearer text-1"})).headers["x-pierhead-model"] == "a"


@pytest.mark.parametrize("sticky", ["user", "header:x-session", "conversation"])
async def test_who_is_recognised_stays_with_a_destination(town: Town, sticky: str) -> None:
    await town.open(Plan(to=(Share("a"), Share("b")), sticky=sticky), a=says("a"), b=says("b"))
    seen: dict[str, set[str]] = {}
    for name in [f"n{i}" for i in range(12)] * 3:
        length = len(seen.get(name, ())) + 1
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": name}]
        messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y" * 70000}] * length
        answer = await town.ask(user=name, headers={"x-session": name}, messages=messages)
        seen.setdefault(name, set()).add(answer.headers["x-pierhead-model"])
    assert all(len(models) == 1 for models in seen.values())
    assert set.union(*seen.values()) == {"a", "b"}


# --- fallbacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("handler", "kind"),
    [(fails(500), "error"), (fails(429), "overload"), (fails(503), "overload"), (fails(504), "timeout")],
)
async def test_the_next_one_is_asked_after_the_trouble_it_is_there_for(
    town: Town, handler: Any, kind: Any, stream: bool
) -> None:
    await town.open(Plan(to=(Share("a"),), fallbacks=(Fallback("b", (kind,)),)), a=handler, b=says("b"))
    answer = await town.ask(stream=stream)
    assert answer.status == 200, answer.body
    assert answer.headers["x-pierhead-model"] == "b"
    assert b'"b"' in answer.body
    attempts = await town.metric("pierhead_route_attempts_total")
    assert attempts[f'pierhead_route_attempts_total{{route="r",destination="a",result="{kind}"}}'] == 1
    assert attempts['pierhead_route_attempts_total{route="r",destination="b",result="ok"}'] == 1


def test_what_one_engine_cannot_do_another_may() -> None:
    fault = Fault(404, "not_supported", "the engine of 'm' cannot answer /v1/rerank.")
    assert trouble(fault) == "error"
    assert [fault.status_in(dialect) for dialect in ("openai", "ollama", "kserve")] == [404, 400, 400]
    assert trouble(Fault(400, "not_supported", "'m' does not support images.")) is None


async def test_other_trouble_is_told_as_it_is(town: Town) -> None:
    plan = Plan(to=(Share("a"),), fallbacks=(Fallback("b", ("overload",)),))
    await town.open(plan, a=fails(500), b=says("b"))
    answer = await town.ask()
    assert (answer.status, answer.json()["error"]["code"]) == (500, "broken")
    assert not town.count("b")


async def test_the_clients_own_mistakes_are_not_repeated_elsewhere(town: Town) -> None:
    kinds: Any = ("error", "overload", "timeout", "context")
    await town.open(Plan(to=(Share("a"),), fallbacks=(Fallback("b", kinds),)), a=fails(400), b=says("b"))
    assert (await town.ask()).status == 400
    assert not town.count("b")


async def test_a_prompt_too_long_goes_to_a_longer_model_where_that_is_asked_for(town: Town) -> None:
    plan = Plan(to=(Share("a"),), fallbacks=(Fallback("b", ("context",)),))
    await town.open(plan, a=fails(400, "context_length_exceeded"), b=says("b"))
    assert (await town.ask()).headers["x-pierhead-model"] == "b"


async def test_fallbacks_are_asked_in_their_order_and_each_once(town: Town) -> None:
    plan = Plan(to=(Share("a"),), fallbacks=(Fallback("b"), Fallback("a"), Fallback("c")))
    await town.open(plan, a=fails(500), b=fails(502), c=fails(500, "last"))
    answer = await town.ask()
    assert (answer.status, answer.json()["error"]["code"]) == (500, "last")
    assert [town.count(name) for name in "abc"] == [1, 1, 1]


async def test_an_engine_that_does_not_listen_or_breaks_off_is_replaced(town: Town) -> None:
    async def resets(call: Any) -> None:
        call.reset()

    plan = Plan(to=(Share("a"),), fallbacks=(Fallback("b"), Fallback("c")))
    await town.open(plan, a=resets, b=resets, c=says("c"))
    assert (await town.ask()).headers["x-pierhead-model"] == "c"
    assert (await town.ask(stream=True)).headers["x-pierhead-model"] == "c"


async def test_a_model_that_cannot_start_is_replaced(town: Town) -> None:
    await town.open(Plan(to=(Share("cold"),), fallbacks=(Fallback("b"),)), b=says("b"))
    b = link.Route(name="b", endpoints=(town.engines["b"].endpoint,))
    plan = Plan(to=(Share("cold"),), fallbacks=(Fallback("b"),))
    await town.gate.serve(link.Route(name="r", plan=plan), link.Route(name="cold"), b)
    asking = asyncio.create_task(town.ask())
    wish = await town.gate.next(link.EnsureReady)
    assert wish.model == "cold"
    error = {"code": "engine_failed", "message": "broken", "http_status": 502}
    town.gate.say(link.StartResult(id=wish.id, error=error))
    assert (await asking).headers["x-pierhead-model"] == "b"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_first_byte_has_its_time(town: Town, stream: bool) -> None:
    async def hangs(call: Any) -> None:
        if stream:
            await call.sse()  # a head is no byte of an answer
        await call.reader.read(1)

    plan = Plan(to=(Share("a"),), fallbacks=(Fallback("b", ("timeout",)),), timeout=0.2)
    await town.open(plan, a=hangs, b=says("b"))
    assert (await town.ask(stream=stream)).headers["x-pierhead-model"] == "b"
    assert await asyncio.wait_for(town.engines["a"].gone.get(), 10) == "closed"


async def test_a_stream_that_begins_with_an_error_is_replaced_or_told_with_its_status(town: Town) -> None:
    async def overloaded(call: Any) -> None:
        await call.sse()
        await call.event({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}})
        await call.end()

    plan = Plan(to=(Share("a"),), fallbacks=(Fallback("b", ("overload",)),))
    await town.open(plan, a=overloaded, b=says("b"))
    assert (await town.ask(stream=True)).headers["x-pierhead-model"] == "b"
    models = [link.Route(name=n, endpoints=(e.endpoint,)) for n, e in town.engines.items()]
    await town.gate.serve(link.Route(name="r", plan=Plan(to=(Share("a"),))), *models)
    answer = await town.ask(stream=True)
    assert (answer.status, answer.json()["error"]["message"]) == (503, "busy")


async def test_a_stream_of_one_piece_that_tells_an_error_is_replaced_too(town: Town) -> None:
    async def overloaded(call: Any) -> None:
        raw = b'data: {"error":{"type":"overloaded_error","message":"busy"}}\n\n'
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n"
        await call.send(head % len(raw) + raw)

    plan = Plan(to=(Share("a"),), fallbacks=(Fallback("b", ("overload",)),))
    await town.open(plan, a=overloaded, b=says("b"))
    assert (await town.ask(stream=True)).headers["x-pierhead-model"] == "b"
    models = [link.Route(name=n, endpoints=(e.endpoint,)) for n, e in town.engines.items()]
    await town.gate.serve(link.Route(name="r", plan=Plan(to=(Share("a"),))), *models)
    assert (await town.ask(stream=True)).status == 503


async def test_after_the_first_byte_nobody_else_is_asked(town: Town) -> None:
    async def breaks(call: Any) -> None:
        await call.sse()
        await call.event({"choices": [{"index": 0, "delta": {"content": "half"}}]})
        call.reset()

    await town.open(Plan(to=(Share("a"),), fallbacks=(Fallback("b"),)), a=breaks, b=says("b"))
    answer = await town.ask(stream=True)
    assert answer.status == 200
    assert b"half" in answer.body
    assert b'"error"' in answer.body
    assert not town.count("b")


async def test_a_client_that_leaves_is_not_asked_for_elsewhere(town: Town) -> None:
    entered = asyncio.Event()

    async def hangs(call: Any) -> None:
        entered.set()
        await call.reader.read(1)

    await town.open(Plan(to=(Share("a"),), fallbacks=(Fallback("b"),), timeout=30), a=hangs, b=says("b"))
    wire = await town.gate.wire(unix=True)
    raw = json.dumps({"model": "r", "messages": [{"role": "user", "content": "hi"}]}).encode()
    await wire.send(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (PATH.encode(), len(raw)) + raw)
    await asyncio.wait_for(entered.wait(), 10)
    wire.close()
    assert await asyncio.wait_for(town.engines["a"].gone.get(), 10) == "closed"
    assert not town.count("b")


async def test_large_bodies_fall_back_too(town: Town) -> None:
    await town.open(Plan(to=(Share("a"),), fallbacks=(Fallback("b"),)), a=fails(500), b=says("b"))
    text = "x" * 500_000
    assert (await town.ask(text=text)).headers["x-pierhead-model"] == "b"
    assert town.bodies("b")[0]["messages"][0]["content"] == text


async def test_a_refused_key_does_not_try_fallbacks(new_gate: New, new_engine: New) -> None:
    town = Town(await new_gate(require_key=True), new_engine)
    await town.open(
        Plan(to=(Share("a"),), fallbacks=(Fallback("b"),)), (key("text", "key_1"),), a=says("a"), b=says("b")
    )
    assert (await town.ask(headers={"authorization": "Bearer wrong"})).status == 401
    assert not town.count("a") + town.count("b")


# --- shadows ----------------------------------------------------------------------------------------------------------


async def until(town: Town, name: str, value: float) -> None:
    async with asyncio.timeout(10):
        while (await town.metric(name)).get(f'{name}{{route="r",destination="b"}}') != value:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_shadow_gets_a_copy_and_its_answer_is_counted_and_thrown_away(town: Town) -> None:
    await town.open(Plan(to=(Share("a"),), mirror=Mirror("b", 1.0)), a=says("a"), b=says("b"))
    for stream in (False, True):
        answer = await town.ask(stream=stream)
        assert answer.headers["x-pierhead-model"] == "a"
        assert b'"b"' not in answer.body
    await until(town, "pierhead_mirror_tokens_total", 10)
    one, two = (town.bodies(name)[0] for name in "ab")
    assert one == two
    tokens = await town.metric("pierhead_prompt_tokens_total")
    assert 'pierhead_prompt_tokens_total{model="b"}' not in tokens, "it is counted apart"


@pytest.mark.parametrize("trouble", ["fails", "hangs", "breaks"])
async def test_a_shadow_in_trouble_never_reaches_the_client(town: Town, trouble: str) -> None:
    async def bad(call: Any) -> None:
        if trouble == "fails":
            await call.json({"error": {}}, 500)
        elif trouble == "breaks":
            call.reset()
        else:
            await call.reader.read(1)

    await town.open(Plan(to=(Share("a"),), mirror=Mirror("b", 1.0)), a=says("a"), b=bad)
    for _ in range(3):
        assert (await town.ask()).status == 200
    await until(town, "pierhead_mirror_requests_total", 3)
    if trouble != "hangs":
        await until(town, "pierhead_mirror_failed_total", 3)


@pytest.mark.parametrize(
    ("bound", "sent"), [({"concurrent": 2}, 2), ({"requests_per_minute": 1}, 1), ({"tokens_per_day": 600}, 2)]
)
async def test_a_shadow_keeps_to_its_budget(town: Town, bound: dict[str, int], sent: int) -> None:
    async def hangs(call: Any) -> None:
        await call.reader.read(1)

    await town.open(
        Plan(to=(Share("a"),), mirror=Mirror("b", 1.0, **{"concurrent": 99, "requests_per_minute": 6000} | bound)),
        a=says("a"),
        b=hangs,
    )
    for _ in range(5):
        assert (await town.ask()).status == 200
    await until(town, "pierhead_mirror_requests_total", sent)
    await until(town, "pierhead_mirror_skipped_total", 5 - sent)


async def test_a_share_of_nothing_sends_nothing(town: Town) -> None:
    await town.open(Plan(to=(Share("a"),), mirror=Mirror("b", 0.0)), a=says("a"), b=says("b"))
    for _ in range(5):
        await town.ask()
    assert not town.count("b")


async def test_a_destination_that_keeps_failing_is_left_alone_for_a_while(town: Town) -> None:
    broken = True

    async def moody(call: Any) -> None:
        await (fails(500) if broken else says("a"))(call)

    await town.open(Plan(to=(Share("a"),), fallbacks=(Fallback("b"),)), a=moody, b=says("b"))
    for _ in range(8):
        assert (await town.ask()).headers["x-pierhead-model"] == "b"
    assert town.count("a") == 3
    broken = False
    async with asyncio.timeout(10):
        while (await town.ask()).headers["x-pierhead-model"] != "a":
            pass
    assert (await town.ask()).headers["x-pierhead-model"] == "a", "it is well again"


async def test_a_fallback_gives_back_what_the_first_attempt_was_granted(new_gate: New, new_engine: New) -> None:
    town = Town(await new_gate(require_key=True), new_engine)
    grants = link.Grants(concurrent=1, tpm=100_000, budgets=(link.Budget(5000),))
    held = link.Key(id="key_1", mac=key("text", "key_1").mac, grants=grants)
    await town.open(Plan(to=(Share("a"),), fallbacks=(Fallback("b"),)), (held,), a=fails(500), b=says("b"))
    for _ in range(6):  # more than the budget would hold, if each attempt were charged for its whole grant
        answer = await town.ask(headers={"authorization": "Bearer text"}, max_tokens=1000)
        assert answer.status == 200, answer.body
    assert (await town.metric("pierhead_gateway_holds_open"))["pierhead_gateway_holds_open"] == 0
    assert (await town.metric("pierhead_gateway_relays_open")).get("pierhead_gateway_relays_open", 0) == 0
