"""Who waits for a slot and how: queues in front of engines, what the waiting are told, and who is let in next."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from pierhead.config import TrafficSettings
from pierhead.gateway import link
from pierhead.gateway.lanes import Lane, Ticket
from pierhead.gateway.probes import probe
from pierhead.gateway.upstream import Target
from pierhead.routing.health import Health, Tolerance

HELLO = [{"role": "user", "content": "hi"}]


def route(*engines: Any, slots: int = 1, name: str = "m") -> link.Route:
    endpoints = tuple(msgspec.structs.replace(e.endpoint, slots=slots) for e in engines)
    return link.Route(name=name, endpoints=endpoints)


class Script:
    """An engine's handler that answers when told to, and knows in which order requests came."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.came: asyncio.Queue[str] = asyncio.Queue()
        self.go = asyncio.Semaphore(0)
        self.now = 0
        self.most = 0

    async def __call__(self, call: Any) -> None:
        if not call.body:  # the gateway itself asks for metrics and health
            await call.json({})
            return
        self.now += 1
        self.most = max(self.most, self.now)
        who = str(json.loads(call.body).get("user", ""))
        self.order.append(who)
        self.came.put_nowait(who)
        try:
            await self.go.acquire()
            if json.loads(call.body).get("stream"):
                await call.sse()
                await call.event({"choices": [{"delta": {"content": "x"}}]})
                await call.event(b"[DONE]")
                await call.end()
            else:
                await call.json({"ok": who, "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
        finally:
            self.now -= 1

    async def next(self) -> str:
        async with asyncio.timeout(20):
            return await self.came.get()


def ask(gate: Any, who: str, **more: Any) -> asyncio.Task[Any]:
    headers = more.pop("headers", None)
    body = {"model": "m", "messages": HELLO, "user": who} | more
    return asyncio.create_task(gate.ask("POST", "/v1/chat/completions", body, headers=headers))


async def waiting(gate: Any, count: int, model: str = "m") -> None:
    """Return once ``count`` requests wait, as the gateway's own metrics say."""
    async with asyncio.timeout(20):
        while True:
            text = (await gate.ask("GET", "/metrics", unix=True)).body.decode()
            if f'pierhead_queue_waiting{{model="{model}"}} {count}\n' in text:
                return


async def test_no_engine_gets_more_than_its_slots_and_the_rest_is_told_that_it_waited(gate, new_engine):
    script = Script()
    await gate.serve(route(await new_engine(script), slots=2))
    asked = [ask(gate, str(i)) for i in range(5)]
    await script.next()
    await script.next()
    await waiting(gate, 3)
    assert script.most == 2
    for _ in range(5):
        script.go.release()
    answers = [await a for a in asked]
    assert [a.status for a in answers] == [200] * 5
    assert script.most == 2
    told = sorted(
        int(a.headers["x-pierhead-queue-position"]) for a in answers if "x-pierhead-queue-position" in a.headers
    )
    assert told == [1, 2, 3]
    assert all(
        int(a.headers["x-pierhead-queue-wait-ms"]) >= 0 for a in answers if "x-pierhead-queue-position" in a.headers
    )
    await waiting(gate, 0)


async def test_a_full_queue_answers_429_with_a_time_to_come_again_in_each_dialect(new_gate, new_engine):
    script = Script()
    gate = await new_gate(traffic={"*": {"queue_limit": 1}})
    engine = await new_engine(script)
    await gate.serve(route(engine))
    first, second = ask(gate, "1"), ask(gate, "2")
    await script.next()
    await waiting(gate, 1)
    refused = await ask(gate, "3")
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
    assert "queue_limit" in error["hint"]
    script.go.release()
    script.go.release()
    assert {(await first).status, (await second).status} == {200}


async def test_who_leaves_the_queue_is_out_at_once_and_never_reaches_the_engine(gate, new_engine, http):
    script = Script()
    await gate.serve(route(await new_engine(script)))
    first = ask(gate, "first")
    await script.next()
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", {"model": "m", "messages": HELLO, "user": "gone"}))
    await waiting(gate, 1)
    third = ask(gate, "third")
    await waiting(gate, 2)
    wire.close()
    await waiting(gate, 1)
    script.go.release()
    script.go.release()
    assert [(await first).status, (await third).status] == [200, 200]
    assert script.order == ["first", "third"]


async def test_a_request_is_dropped_when_its_own_time_is_over(gate, new_engine):
    script = Script()
    await gate.serve(route(await new_engine(script)))
    first = ask(gate, "first")
    await script.next()
    late = await ask(gate, "late", headers={"x-request-timeout": "0.2"})
    assert late.status == 504
    assert late.json()["error"]["code"] == "queue_timeout"
    assert "retry-after" in late.headers
    script.go.release()
    assert (await first).status == 200
    assert script.order == ["first"]


async def test_an_answer_that_takes_longer_than_the_client_waits_is_cut(gate, new_engine):
    script = Script()
    await gate.serve(route(await new_engine(script)))
    late = await ask(gate, "late", headers={"x-request-timeout": "0.3"})
    assert late.status == 504
    assert late.json()["error"]["code"] == "timeout"


@pytest.mark.parametrize("value", ["0", "-1", "soon", "1e9", ".5", "1.", "9" * 30])
async def test_a_timeout_that_is_no_number_of_seconds_is_refused(gate, new_engine, value):
    await gate.serve(route(await new_engine(Script())))
    assert (await ask(gate, "x", headers={"x-request-timeout": value})).status == 400


async def test_one_keys_many_requests_do_not_delay_anothers_first(gate, new_engine):
    script = Script()
    await gate.serve(route(await new_engine(script)))
    running = ask(gate, "running")
    await script.next()
    many = [ask(gate, f"many{i}") for i in range(6)]
    await waiting(gate, 6)
    wire = await gate.wire(unix=True)  # another peer, and so another share
    other = asyncio.create_task(
        gate.ask("POST", "/v1/chat/completions", {"model": "m", "messages": HELLO, "user": "other"}, unix=True)
    )
    await waiting(gate, 7)
    wire.close()
    for _ in range(8):
        script.go.release()
    for task in (running, other, *many):
        assert (await task).status == 200
    assert script.order.index("other") <= 2


async def test_a_stream_that_waits_is_told_how_it_stands_and_then_gets_its_answer(new_gate, new_engine, http):
    script = Script()
    gate = await new_gate(traffic={"*": {"notice": 0.05}})
    await gate.serve(route(await new_engine(script)))
    first = ask(gate, "first")
    await script.next()
    wire = await gate.wire()
    await wire.send(
        http("POST", "/v1/chat/completions", {"model": "m", "messages": HELLO, "user": "s", "stream": True})
    )
    head = await wire.head()
    assert head.status == 200
    assert head.headers["content-type"] == "text/event-stream"
    assert head.headers["x-pierhead-queue-position"] == "1"
    chunks = wire.chunks()
    assert (await anext(chunks)).startswith(b": queued position=1")
    assert (await anext(chunks)).startswith(b": queued position=1")
    script.go.release()
    script.go.release()
    rest = b"".join([c async for c in chunks])
    assert rest.endswith(b'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n')
    assert (await first).status == 200
    await wire.send(http("GET", "/health"))  # the connection is as good as before
    assert (await wire.answer()).status == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_what_fails_after_the_first_comment_ends_the_stream_in_the_dialects_own_words(
    new_gate, new_engine, http, path
):
    script = Script()
    gate = await new_gate(traffic={"*": {"notice": 0.05, "queue_timeout": 0.4}})
    engine = await new_engine(script)
    endpoint = msgspec.structs.replace(engine.endpoint, slots=1, serves=("chat", "messages"))
    await gate.serve(link.Route(name="m", endpoints=(endpoint,)))
    first = ask(gate, "first")
    await script.next()
    wire = await gate.wire()
    await wire.send(http("POST", path, {"model": "m", "messages": HELLO, "stream": True, "max_tokens": 5}))
    got = await wire.answer()
    assert got.status == 200
    events = [e for e in got.body.split(b"\n\n") if e and not e.startswith(b":")]
    assert len(events) == 1
    if path == "/v1/messages":
        assert events[0].startswith(b"event: error\ndata: ")
        assert json.loads(events[0].partition(b"data: ")[2])["error"]["type"] == "timeout_error"
    else:
        assert json.loads(events[0].removeprefix(b"data: "))["error"]["code"] == "queue_timeout"
    script.go.release()
    assert (await first).status == 200


async def test_an_engines_error_after_the_first_comment_is_told_as_an_event(new_gate, new_engine, http):
    script = Script()

    async def answer(call: Any) -> None:
        if not call.body or json.loads(call.body)["user"] == "first":
            await script(call)
        else:
            await call.json({"error": {"message": "no such grammar"}}, 400)

    gate = await new_gate(traffic={"*": {"notice": 0.05}})
    await gate.serve(route(await new_engine(answer)))
    first = ask(gate, "first")
    await script.next()
    wire = await gate.wire()
    await wire.send(
        http("POST", "/v1/chat/completions", {"model": "m", "messages": HELLO, "user": "s", "stream": True})
    )
    await wire.head()
    chunks = wire.chunks()
    await anext(chunks)
    script.go.release()
    last = [c async for c in chunks][-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["message"].startswith("no such grammar")
    assert (await first).status == 200


async def test_a_stream_that_is_left_while_it_waits_frees_its_place(new_gate, new_engine, http):
    script = Script()
    gate = await new_gate(traffic={"*": {"notice": 0.05}})
    await gate.serve(route(await new_engine(script)))
    first = ask(gate, "first")
    await script.next()
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", {"model": "m", "messages": HELLO, "stream": True}))
    await wire.head()
    wire.close()
    await waiting(gate, 0)
    script.go.release()
    assert (await first).status == 200


async def test_keys_with_a_higher_priority_go_first(new_gate, new_engine):
    gate = await new_gate(require_key=True)
    pepper = b"p" * 32
    keys = tuple(
        link.Key(
            id=name,
            mac=hmac.new(pepper, name.encode(), hashlib.sha256).hexdigest(),
            grants=link.Grants(priority=priority),
        )
        for name, priority in (("low", 0), ("high", 5))
    )
    script = Script()
    engine = await new_engine(script)
    await gate.serve(route(engine), keys=keys, pepper=pepper.hex())
    running = ask(gate, "running", headers={"authorization": "Bearer low"})
    await script.next()
    low = [ask(gate, f"low{i}", headers={"authorization": "Bearer low"}) for i in range(3)]
    await waiting(gate, 3)
    high = ask(gate, "high", headers={"authorization": "Bearer high"})
    await waiting(gate, 4)
    for _ in range(5):
        script.go.release()
    for task in (running, high, *low):
        assert (await task).status == 200
    assert script.order[1] == "high"


async def test_slots_that_a_new_snapshot_brings_let_the_waiting_in(gate, new_engine):
    script = Script()
    engine = await new_engine(script)
    second = await new_engine(script)
    await gate.serve(route(engine))
    asked = [ask(gate, str(i)) for i in range(3)]
    await script.next()
    await waiting(gate, 2)
    await gate.serve(route(engine, second))
    await script.next()
    await waiting(gate, 1)
    for _ in range(3):
        script.go.release()
    assert [(await a).status for a in asked] == [200] * 3


async def test_those_who_wait_when_the_last_replica_goes_have_the_model_started_again(gate, new_engine):
    script = Script()
    engine = await new_engine(script, "old")
    await gate.serve(route(engine))
    running = ask(gate, "running")
    await script.next()
    asked = [ask(gate, str(i)) for i in range(3)]
    await waiting(gate, 3)
    await gate.serve(link.Route(name="m"))
    wish = await gate.next(link.EnsureReady)
    new = await new_engine(script, "new")
    gate.say(link.StartResult(id=wish.id, endpoint=msgspec.structs.replace(new.endpoint, slots=1)))
    for _ in range(4):
        script.go.release()
    assert [(await a).status for a in (running, *asked)] == [200] * 4
    assert len(new.calls) == 3


async def test_a_cold_start_is_a_wait_like_any_other_and_tells_its_progress(new_gate, new_engine, http):
    script = Script()
    gate = await new_gate(traffic={"*": {"notice": 0.05, "queue_limit": 2}})
    engine = await new_engine(script)
    await gate.serve(link.Route(name="m"))
    wire = await gate.wire()
    await wire.send(
        http("POST", "/v1/chat/completions", {"model": "m", "messages": HELLO, "user": "s", "stream": True})
    )
    wish = await gate.next(link.EnsureReady)
    plain = ask(gate, "plain")
    await waiting(gate, 2)
    assert (await ask(gate, "one too many")).status == 429
    gate.say(link.StartProgress(id=wish.id, state="loading", detail="the\nmodel", elapsed_s=1.5))
    await wire.head()
    chunks = wire.chunks()
    async with asyncio.timeout(20):
        while b"loading" not in (text := await anext(chunks)):
            pass
    assert text.startswith(b": queued position=1")
    assert text.count(b"\n") == 2
    gate.say(link.StartResult(id=wish.id, endpoint=msgspec.structs.replace(engine.endpoint, slots=1)))
    script.go.release()
    script.go.release()
    assert b"".join([c async for c in chunks]).endswith(b"data: [DONE]\n\n")
    got = await plain
    assert got.status == 200
    assert got.headers["x-pierhead-queue-position"] == "2"


async def test_embeddings_take_no_slot(gate, new_engine):
    script = Script()

    async def answer(call: Any) -> None:
        if b"/v1/embeddings" in call.head:
            await call.json({"data": []})
        else:
            await script(call)

    await gate.serve(route(await new_engine(answer)))
    first = ask(gate, "first")
    await script.next()
    assert (await gate.ask("POST", "/v1/embeddings", {"model": "m", "input": "x"})).status == 200
    script.go.release()
    assert (await first).status == 200


async def test_a_thousand_requests_one_after_another_leave_every_slot_free(gate, new_engine, http):
    async def answer(call: Any) -> None:
        await call.json({"ok": True})

    await gate.serve(route(await new_engine(answer), slots=2))
    wires = [await gate.wire() for _ in range(8)]

    async def many(wire: Any) -> None:
        for i in range(60):
            if i % 7 == 3:
                other = await gate.wire()
                await other.send(http("POST", "/v1/chat/completions", {"model": "m", "messages": HELLO}))
                other.close()
            await wire.send(http("POST", "/v1/chat/completions", {"model": "m", "messages": HELLO}))
            assert (await wire.answer()).status == 200

    await asyncio.gather(*map(many, wires))
    await waiting(gate, 0)
    text = (await gate.ask("GET", "/metrics", unix=True)).body.decode()
    assert 'pierhead_slots_busy{model="m",replica="e0"} 0\n' in text


def planned(engine: Any, other: Any, *fallbacks: str) -> tuple[link.Route, ...]:
    plan = link.Plan(to=(link.Share("m"),), fallbacks=tuple(link.Fallback(name) for name in fallbacks), timeout=0.8)
    return route(engine), route(other, name="other", slots=0), link.Route(name="r", plan=plan)


async def test_a_route_with_a_fallback_waits_in_silence_and_moves_on_when_its_time_is_over(new_gate, new_engine, http):
    script = Script()
    gate = await new_gate(traffic={"*": {"notice": 0.05}})

    async def other(call: Any) -> None:
        await call.sse()
        await call.event({"choices": [{"delta": {"content": "other"}}]})
        await call.event(b"[DONE]")
        await call.end()

    await gate.serve(*planned(await new_engine(script), await new_engine(other), "other"))
    first = ask(gate, "first")
    await script.next()
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", {"model": "r", "messages": HELLO, "stream": True}))
    got = await wire.answer()
    assert b"other" in got.body
    assert got.headers["x-pierhead-model"] == "other"
    assert not got.body.startswith(b":")
    script.go.release()
    assert (await first).status == 200


async def test_a_stream_that_was_told_how_it_stands_is_not_cut_once_it_has_begun(new_gate, new_engine, http):
    script, rest = Script(), asyncio.Event()

    async def answer(call: Any) -> None:
        if not call.body or not json.loads(call.body).get("stream"):
            await script(call)
            return
        await call.sse()
        await call.event({"n": 1})
        await rest.wait()
        await call.event(b"[DONE]")
        await call.end()

    gate = await new_gate(traffic={"*": {"notice": 0.05}})
    await gate.serve(*planned(await new_engine(answer), await new_engine(script)))
    first = ask(gate, "first")
    await script.next()
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", {"model": "r", "messages": HELLO, "stream": True}))
    head = await wire.head()
    assert head.headers["x-pierhead-model"] == "m"
    script.go.release()
    assert (await first).status == 200
    assert (await ask(gate, "late", headers={"x-request-timeout": "1"})).status == 504  # longer than the route allows
    rest.set()
    assert b"".join([c async for c in wire.chunks()]).endswith(b'data: {"n": 1}\n\ndata: [DONE]\n\n')


def suspended(lane: Lane, *engines: Any, pause: float) -> tuple[Any, Any]:
    """Two replicas with a slot each: the first is busy, the second has failed and rests for ``pause`` seconds."""
    first, second = (Target(msgspec.structs.replace(e, slots=1)) for e in engines)
    second.health = Health(Tolerance(initial=pause))
    lane.update((first, second))
    for _ in range(3):
        second.health.failure(time.monotonic())
    assert lane.take(Ticket("a", 1, time.monotonic() + 20), time.monotonic()) is first
    return first, second


async def never() -> Any:
    raise AssertionError("replicas run")


@pytest.mark.parametrize("after", [False, True])
async def test_who_waits_is_let_in_when_a_suspended_replica_may_be_tried_again_though_no_request_ends(after: bool):
    lane = Lane("m", TrafficSettings())
    _, second = suspended(lane, link.Endpoint("a", "/a"), link.Endpoint("b", "/b"), pause=30.0 if after else 0.1)
    seats = [asyncio.create_task(lane.seat(Ticket("k", 1, time.monotonic() + 20), never)) for _ in range(2)]
    if after:  # suspended for less while somebody waits already
        await asyncio.sleep(0)
        second.health.until = time.monotonic() + 0.1
        seats.append(asyncio.create_task(lane.seat(Ticket("k", 1, time.monotonic() + 20), never)))
    async with asyncio.timeout(10):
        done, left = await asyncio.wait(seats, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result() for task in done] == [second]
    assert time.monotonic() >= second.health.until
    for task in left:
        task.cancel()


async def test_a_probe_that_finds_a_replica_well_lets_in_who_waits(new_engine):
    engine = await new_engine(Script())
    lane = Lane("m", TrafficSettings(probe_interval=0.1))
    _, second = suspended(lane, link.Endpoint("a", "/a"), engine.endpoint, pause=60.0)
    seat = asyncio.create_task(lane.seat(Ticket("k", 1, time.monotonic() + 20), never))
    routes: Any = SimpleNamespace(lanes={"m": lane})
    probing = asyncio.create_task(probe(routes))
    async with asyncio.timeout(10):
        assert await seat is second
    probing.cancel()


async def test_metrics_name_each_lane_once(gate, new_engine):
    script = Script()
    plan = link.Plan(to=(link.Share("m"),))
    engine = await new_engine(script)
    await gate.serve(msgspec.structs.replace(route(engine), hidden=True), link.Route(name="m", plan=plan))
    text = (await gate.ask("GET", "/metrics", unix=True)).body.decode()
    assert text.count('pierhead_queue_waiting{model="m"}') == 1
