"""Several replicas of one model: who gets what, who is left out while it is ill, and who is asked instead."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pierhead.gateway import link

SYSTEM = "You answer in the style of a harbour master. " * 40


def chat(who: str, text: str = "hi", **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": who + SYSTEM}, {"role": "user", "content": text}]
    return {"model": "m", "messages": messages} | more


def route(*engines: Any, slots: int = 0) -> link.Route:
    return link.Route(name="m", endpoints=tuple(msgspec.structs.replace(e.endpoint, slots=slots) for e in engines))


class Replicas:
    """Engines that say who they are; ``ill`` ones fail in the way given."""

    def __init__(self, new_engine: Any) -> None:
        self._new = new_engine
        self.ill: dict[str, str] = {}
        self.engines: dict[str, Any] = {}
        self.hold = asyncio.Event()
        self.hold.set()
        self.slow = ""
        self.stuck = asyncio.Event()
        self.came: asyncio.Queue[str] = asyncio.Queue()

    async def add(self, name: str) -> Any:
        async def answer(call: Any) -> None:
            way = self.ill.get(name, "")
            if b"GET /health" in call.head:
                await call.json({}, 503 if way else 200)
            elif not call.body:
                await call.json({})
            elif name == self.slow:
                self.came.put_nowait(name)
                await self.stuck.wait()
                await call.json({"by": name})
            elif way:
                self.came.put_nowait(name)
                await self.fail(call, way)
            else:
                self.came.put_nowait(name)
                await self.hold.wait()
                await call.json({"by": name})

        self.engines[name] = await self._new(answer, name)
        return self.engines[name]

    async def fail(self, call: Any, way: str) -> None:
        if way == "reset":
            call.reset()
        elif way == "half":
            await call.send(b"HTTP/1.1 200 OK\r\nContent-Le")
            call.reset()
        elif way.isdigit():
            await call.json({"error": {"message": "no"}}, int(way))
        elif way == "midway":
            await call.sse()
            await call.event({"n": 1})
            call.reset()

    def asked(self, name: str) -> int:
        return sum(1 for call in self.engines[name].calls if call.body)


@pytest.fixture
async def replicas(new_engine: Any) -> Replicas:
    made = Replicas(new_engine)
    for name in "abc":
        await made.add(name)
    return made


async def ask(gate: Any, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Any:
    return await gate.ask("POST", path, body, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def by(gate: Any, body: Any, **headers: str) -> str:
    got = await ask(gate, body, **headers)
    assert got.status == 200
    return got.json()["by"]


async def test_a_prompt_that_begins_like_another_goes_to_the_same_replica_and_others_spread(gate, replicas):
    await gate.serve(route(*replicas.engines.values()))
    homes = {user: await by(gate, chat(user)) for user in "xyz"}
    assert set(homes.values()) == set("abc")
    for turn in range(3):
        for user in "zxy":
            assert await by(gate, chat(user, "more " * turn, temperature=0.5)) == homes[user]


async def test_a_large_body_is_placed_by_its_prompt_too(gate, replicas):
    await gate.serve(route(*replicas.engines.values()))
    big = "An old log line about a ship. " * 5000
    homes = {user: await by(gate, chat(user, big)) for user in "xyz"}
    assert set(homes.values()) == set("abc")
    for user in "zyx":
        assert await by(gate, chat(user, big + "and more")) == homes[user]


@pytest.mark.parametrize("policy", ["least", "p2c", "round-robin"])
async def test_each_policy_spreads_requests_that_run_at_a_time(new_gate, replicas, policy):
    gate = await new_gate(traffic={"m": {"policy": policy}})
    await gate.serve(route(*replicas.engines.values()))
    replicas.hold.clear()
    tasks = [asyncio.create_task(by(gate, chat("same"))) for _ in range(9)]
    async with asyncio.timeout(20):
        for _ in range(9):
            await replicas.came.get()
    replicas.hold.set()
    counted = Counter([await t for t in tasks])
    assert all(n >= 1 for n in counted.values())
    assert len(counted) == 3
    if policy != "p2c":
        assert set(counted.values()) == {3}


@pytest.mark.parametrize("way", ["reset", "half", "503"])
async def test_a_replica_that_fails_is_replaced_by_another_before_anything_was_sent(gate, replicas, way):
    await gate.serve(route(*replicas.engines.values()))
    home = await by(gate, chat("x"))
    replicas.ill[home] = way
    assert await by(gate, chat("x")) != home
    assert await by(gate, chat("x", stream=True)) != home


async def test_an_error_that_another_replica_would_give_too_is_told_at_once(gate, replicas):
    await gate.serve(route(*replicas.engines.values()))
    for name in "abc":
        replicas.ill[name] = "400"
    assert (await ask(gate, chat("x"))).status == 400
    assert sum(map(replicas.asked, "abc")) == 1


async def test_nothing_is_sent_again_once_the_client_has_a_part_of_the_answer(gate, replicas):
    await gate.serve(route(*replicas.engines.values()))
    for name in "abc":
        replicas.ill[name] = "midway"
    got = await ask(gate, chat("x", stream=True))
    assert got.status == 200
    assert b'"code":"engine_failed"' in got.body
    assert sum(map(replicas.asked, "abc")) == 1


async def test_when_all_fail_the_last_error_is_told_after_as_many_tries_as_are_allowed(gate, replicas):
    await gate.serve(route(*replicas.engines.values()))
    for name in "abc":
        replicas.ill[name] = "503"
    got = await ask(gate, chat("x"))
    assert got.status == 503
    assert got.json()["error"]["source"] == "engine"
    assert [replicas.asked(n) for n in "abc"] == [1, 1, 1]


async def test_a_replica_that_does_not_listen_is_passed_over(gate, replicas):
    await gate.serve(route(*replicas.engines.values()))
    home = await by(gate, chat("x"))
    await replicas.engines[home].stop()
    for _ in range(4):
        assert await by(gate, chat("x")) != home


async def test_a_replica_that_failed_again_and_again_gets_nothing_until_it_is_well(new_gate, replicas):
    gate = await new_gate(traffic={"*": {"probe_interval": 0.2, "policy": "round-robin"}})
    await gate.serve(route(*replicas.engines.values()))
    replicas.ill["a"] = "reset"
    async with asyncio.timeout(20):
        while await suspended(gate, "a") != 1:
            await by(gate, chat("x"))
    before = replicas.asked("a")
    for _ in range(12):
        await by(gate, chat("x"))
    assert replicas.asked("a") <= before + 2
    del replicas.ill["a"]
    async with asyncio.timeout(20):
        while await suspended(gate, "a") != 0:
            await by(gate, chat("x"))
    assert "a" in [await by(gate, chat("x")) for _ in range(3)]


async def suspended(gate: Any, name: str) -> int:
    text = (await gate.ask("GET", "/metrics", unix=True)).body.decode()
    line = next(
        x for x in text.splitlines() if x.startswith(f'pierhead_replica_suspended{{model="m",replica="{name}"}}')
    )
    return int(line.rpartition(" ")[2])


async def test_probes_alone_find_a_replica_that_is_ill(new_gate, replicas):
    gate = await new_gate(traffic={"*": {"probe_interval": 0.1}})
    replicas.ill["b"] = "503"
    await gate.serve(route(*replicas.engines.values()))
    async with asyncio.timeout(20):
        while await suspended(gate, "b") != 1:
            pass
    assert "b" not in {await by(gate, chat(str(i))) for i in range(9)}


async def test_with_all_replicas_ill_requests_are_tried_and_not_refused(new_gate, replicas):
    gate = await new_gate(traffic={"*": {"probe_interval": 0.1}})
    for name in "abc":
        replicas.ill[name] = "503"
    await gate.serve(route(*replicas.engines.values()))
    async with asyncio.timeout(20):
        while sum([await suspended(gate, n) for n in "abc"]) < 3:
            pass
    replicas.ill.clear()
    assert await by(gate, chat("x")) in "abc"


@pytest.mark.parametrize("sticky", ["user", "X-Session-Id"])
async def test_a_session_stays_on_its_replica_whatever_it_asks(new_gate, replicas, sticky):
    gate = await new_gate(traffic={"m": {"sticky": sticky, "policy": "round-robin"}})
    await gate.serve(route(*replicas.engines.values()))
    homes: dict[str, set[str]] = {}
    for turn in range(4):
        for who in ("s1", "s2", "s3", "s4", "s5"):
            more = {"user": who} if sticky == "user" else {}
            headers = {} if sticky == "user" else {"x_session_id": who}
            homes.setdefault(who, set()).add(await by(gate, chat(str(turn), **more), **headers))
    assert all(len(places) == 1 for places in homes.values())
    assert len(set.union(*homes.values())) > 1
    home = next(iter(homes["s1"]))
    replicas.ill[home] = "reset"
    more, headers = ({"user": "s1"}, {}) if sticky == "user" else ({}, {"x_session_id": "s1"})
    assert await by(gate, chat("x", **more), **headers) != home


async def test_a_replica_that_leaves_keeps_what_it_has_and_gets_nothing_new(gate, replicas, folder: Path):
    await gate.serve(route(*replicas.engines.values()))
    home = await by(gate, chat("x"))
    replicas.hold.clear()
    running = asyncio.create_task(by(gate, chat("x")))
    async with asyncio.timeout(20):
        for _ in range(2):
            assert await replicas.came.get() == home
    await gate.serve(route(*(e for n, e in replicas.engines.items() if n != home)))
    replicas.hold.set()
    assert await running == home
    assert await by(gate, chat("x")) != home


async def test_a_thousand_requests_over_failing_replicas_leave_every_slot_free(gate, replicas):
    await gate.serve(route(*replicas.engines.values(), slots=2))
    ways = ("reset", "", "503", "", "half", "")

    async def many(number: int) -> None:
        for i in range(40):
            replicas.ill["abc"[i % 3]] = ways[(i + number) % 6]
            got = await ask(gate, chat(str(i % 5)))
            assert got.status in (200, 502, 503)

    await asyncio.gather(*map(many, range(8)))
    text = (await gate.ask("GET", "/metrics", unix=True)).body.decode()
    for name in "abc":
        assert f'pierhead_slots_busy{{model="m",replica="{name}"}} 0\n' in text
    assert 'pierhead_queue_waiting{model="m"} 0\n' in text


async def test_what_cannot_be_read_as_a_prompt_is_balanced_all_the_same(gate, replicas):
    await gate.serve(route(*replicas.engines.values()))
    for messages in (None, [None], [{"a": 1}], [[[[]]]] * 300):
        got = await ask(gate, {"model": "m", "messages": messages, "lora": json.dumps([{"id": 0}])})
        assert got.status == 200


async def hedged(new_gate: Any, replicas: Replicas, after: float = 0.05) -> Any:
    gate = await new_gate(traffic={"m": {"hedge_after": after}})
    await gate.serve(route(*replicas.engines.values(), slots=1))
    return gate


async def free(gate: Any) -> None:
    """Return once no slot is in use."""
    async with asyncio.timeout(20):
        while True:
            text = (await gate.ask("GET", "/metrics", unix=True)).body.decode()
            if all(f'pierhead_slots_busy{{model="m",replica="{n}"}} 0\n' in text for n in "abc"):
                return


async def test_a_hedged_request_has_the_answer_of_whoever_begins_first_and_the_other_is_cut(new_gate, replicas):
    gate = await hedged(new_gate, replicas)
    replicas.slow = await by(gate, chat("x"))
    got = await by(gate, chat("x"))
    assert got != replicas.slow
    replicas.stuck.set()  # its answer finds nobody any more
    async with asyncio.timeout(20):
        assert await replicas.engines[replicas.slow].gone.get()
    await free(gate)
    assert sum(map(replicas.asked, "abc")) == 3


async def test_the_first_replica_wins_a_race_that_it_was_only_late_for(new_gate, replicas):
    gate = await hedged(new_gate, replicas)
    replicas.hold.clear()
    task = asyncio.create_task(by(gate, chat("x")))
    async with asyncio.timeout(20):
        assert await replicas.came.get() != await replicas.came.get()
    replicas.hold.set()
    assert await task in "abc"
    await free(gate)


@pytest.mark.parametrize("way", ["reset", "503"])
async def test_who_fails_leaves_the_race_to_the_other(new_gate, replicas, way):
    gate = await hedged(new_gate, replicas)
    replicas.slow = await by(gate, chat("x"))
    for name in "abc":
        if name != replicas.slow:
            replicas.ill[name] = way
    task = asyncio.create_task(by(gate, chat("x")))
    async with asyncio.timeout(20):
        while sum(map(replicas.asked, "abc")) < 3:
            await replicas.came.get()
    replicas.stuck.set()
    assert await task == replicas.slow
    await free(gate)


async def test_a_client_that_leaves_ends_both_runners(new_gate, replicas, http):
    gate = await hedged(new_gate, replicas)
    replicas.hold.clear()
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", chat("x", stream=True)))
    async with asyncio.timeout(20):
        await replicas.came.get()
        await replicas.came.get()
    wire.close()
    await free(gate)
    replicas.hold.set()
    assert await by(gate, chat("x")) in "abc"


async def test_without_the_setting_nothing_is_asked_twice(gate, replicas):
    await gate.serve(route(*replicas.engines.values(), slots=1))
    replicas.hold.clear()
    task = asyncio.create_task(by(gate, chat("x")))
    await replicas.came.get()
    for _ in range(20):
        await gate.ask("GET", "/health")
    replicas.hold.set()
    await task
    assert sum(map(replicas.asked, "abc")) == 1
