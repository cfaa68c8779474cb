"""The gateway and its daemon: starting models, reports, absence and return, draining, handing over."""

from __future__ import annotations

import asyncio
import os

from pierhead.errors import EngineFailed
from pierhead.gateway import link


async def ok(call):
    await call.json({"by": call.headers["x-request-id"]})


async def test_a_model_that_does_not_run_is_started_once_for_all_that_wait(gate, new_engine, chat):
    engine = await new_engine(ok)
    await gate.serve(link.Route(name="m"))
    asked = [asyncio.create_task(gate.ask("POST", "/v1/completions", chat)) for _ in range(5)]
    message = await gate.next(link.EnsureReady)
    assert (message.model, message.failed) == ("m", "")
    await gate.ask("GET", "/health")  # the gateway has read the five by now, or will share the snapshot's endpoint
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    gate.say(link.StartResult(id=message.id, endpoint=engine.endpoint))
    assert [(await a).status for a in asked] == [200] * 5
    assert all(not isinstance(m, link.EnsureReady) for m in list(gate.inbox._queue))


async def test_a_start_that_fails_tells_why_in_the_envelope(gate, chat):
    await gate.serve(link.Route(name="m"))
    asked = asyncio.create_task(gate.ask("POST", "/v1/completions", chat))
    message = await gate.next(link.EnsureReady)
    error = EngineFailed("llama.cpp stopped", hint="See: pier logs m", data={"log": ["bad magic"]})
    gate.say(link.StartResult(id=message.id, error=error.to_dict()))
    got = await asked
    assert got.status == 502
    body = got.json()["error"]
    assert (body["code"], body["source"], body["log"]) == ("engine_failed", "engine", ["bad magic"])
    assert "pier logs m" in body["message"]


async def test_a_start_that_takes_too_long_is_504(new_gate, chat):
    gate = await new_gate(start_timeout=0.5)
    await gate.serve(link.Route(name="m"))
    assert (await gate.ask("POST", "/v1/completions", chat)).status == 504


async def test_without_a_daemon_what_runs_is_served_and_the_rest_says_what_to_type(new_gate, new_engine, chat):
    engine = await new_engine(ok)
    routes = [
        {"name": "m", "endpoints": [{"replica": "r", "socket": str(engine.path)}]},
        {"name": "cold"},
    ]
    gate = await new_gate(extra={"snapshot": {"type": "snapshot", "version": 1, "routes": routes}}, link_up=False)
    assert (await gate.ask("POST", "/v1/completions", chat)).status == 200
    got = await gate.ask("POST", "/v1/completions", chat | {"model": "cold"})
    assert got.status == 503
    assert got.json()["error"]["code"] == "daemon_unavailable"
    assert "pier serve" in got.json()["error"]["message"]


async def test_a_daemon_that_comes_back_is_asked_again_for_what_still_waits(gate, new_engine, chat):
    engine = await new_engine(ok)
    await gate.serve(link.Route(name="m"))
    asked = asyncio.create_task(gate.ask("POST", "/v1/completions", chat))
    await gate.next(link.EnsureReady)
    await gate.drop_link()
    hello = await gate.connect_link()
    assert hello.pid == gate.pid
    assert f"127.0.0.1:{gate.port}" in hello.listeners
    message = await gate.next(link.EnsureReady)
    gate.say(link.StartResult(id=message.id, endpoint=engine.endpoint))
    assert (await asked).status == 200


async def test_an_endpoint_that_refuses_is_reported_once_and_replaced(gate, new_engine, chat, folder):
    engine = await new_engine(ok)
    dead = link.Endpoint(replica="dead", socket=str(folder / "nothing.sock"))
    await gate.serve(link.Route(name="m", endpoints=(dead,)))
    asked = asyncio.create_task(gate.ask("POST", "/v1/completions", chat))
    message = await gate.next(link.EnsureReady)
    assert message.failed == "dead"
    gate.say(link.StartResult(id=message.id, endpoint=engine.endpoint))
    assert (await asked).status == 200


async def test_a_client_that_leaves_stops_waiting_for_the_start(gate, chat, http):
    await gate.serve(link.Route(name="m"))
    wire = await gate.wire(unix=True)
    await wire.send(http("POST", "/v1/completions", chat))
    await gate.next(link.EnsureReady)
    wire.close()
    for _ in range(3):  # the gateway has had its turns to notice
        await gate.ask("GET", "/health")
    asked = asyncio.create_task(gate.ask("POST", "/v1/completions", chat))
    await gate.next(link.EnsureReady)  # nobody waited any more, so the next request asks anew
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


async def test_the_replica_with_the_fewest_open_requests_gets_the_next(gate, new_engine, chat):
    hold, arrived = asyncio.Event(), asyncio.Event()

    async def slow(call):
        if len(first.calls) + len(second.calls) == 6:
            arrived.set()
        await hold.wait()
        await call.json({})

    first, second = await new_engine(slow), await new_engine(slow)
    await gate.serve(link.Route(name="m", endpoints=(first.endpoint, second.endpoint)))
    asked = [asyncio.create_task(gate.ask("POST", "/v1/completions", chat)) for _ in range(6)]
    async with asyncio.timeout(10):
        await arrived.wait()
    assert (len(first.calls), len(second.calls)) == (3, 3)
    hold.set()
    await asyncio.gather(*asked)


async def test_activity_is_reported_when_a_replica_turns_idle(gate, new_engine, chat):
    async def answer(call):
        await call.json({"usage": {"completion_tokens": 4, "prompt_tokens": 31, "details": {"cached": 0}}})

    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    await gate.ask("POST", "/v1/completions", chat)
    finished = prompt = completion = 0
    while not finished:
        for activity in (await gate.next(link.Report)).activity:
            assert activity.replica == engine.endpoint.replica
            finished += activity.finished
            prompt += activity.prompt_tokens
            completion += activity.completion_tokens
            is_open = activity.open
    assert (finished, prompt, completion, is_open) == (1, 31, 4, 0)


async def test_a_stream_goes_on_over_snapshots_that_drop_its_route(gate, new_engine, chat, http):
    go = asyncio.Event()

    async def answer(call):
        await call.sse()
        await call.event({"n": 1})
        await go.wait()
        await call.event(b"[DONE]")
        await call.end()

    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", chat))
    await wire.head()
    await gate.serve()
    go.set()
    assert [c async for c in wire.chunks()][-1] == b"data: [DONE]\n\n"


async def test_a_drain_finishes_streams_and_ends_the_process(new_gate, new_engine, chat, http):
    go = asyncio.Event()

    async def answer(call):
        await call.sse()
        await call.event({"n": 1})
        await go.wait()
        await call.event(b"[DONE]")
        await call.end()

    gate = await new_gate()
    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    busy, idle = await gate.wire(), await gate.wire()
    await busy.send(http("POST", "/v1/chat/completions", chat))
    await busy.head()
    gate.say(link.Drain(grace=30))
    assert await idle.at_eof() == b""
    go.set()
    assert [c async for c in busy.chunks()][-1] == b"data: [DONE]\n\n"
    async with asyncio.timeout(10):
        assert await gate.process.wait() == 0
    assert not gate.admin.exists()


async def test_a_drain_ends_at_its_grace(new_gate, new_engine, chat, http):
    async def answer(call):
        await call.sse()
        await call.reader.read()

    gate = await new_gate()
    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", chat))
    await wire.head()
    gate.say(link.Drain(grace=0.2))
    async with asyncio.timeout(10):
        assert await gate.process.wait() == 0


async def test_a_second_gateway_takes_the_sockets_over_and_no_stream_or_connection_is_lost(
    new_gate, new_engine, chat, http, sockets, folder
):
    go = asyncio.Event()

    async def answer(call):
        if b'"stream"' not in call.body:
            await call.json({})
            return
        await call.sse()
        await call.event({"n": 1})
        await go.wait()
        await call.event(b"[DONE]")
        await call.end()

    old = await new_gate()
    engine = await new_engine(answer)
    route = link.Route(name="m", endpoints=(engine.endpoint,))
    await old.serve(route)
    stream = await old.wire()
    await stream.send(http("POST", "/v1/chat/completions", chat | {"stream": True}))
    await stream.head()
    stop = asyncio.Event()
    served = 0

    async def knock() -> None:
        nonlocal served
        while not stop.is_set():
            assert (await old.ask("POST", "/v1/completions", chat)).status == 200
            served += 1

    knocking = [asyncio.create_task(knock()) for _ in range(4)]
    addresses, fds = await asyncio.to_thread(sockets, old)
    assert set(addresses) == set(old.addresses)
    new = type(old)(folder / "g0", old.settings)
    inherit = [{"fd": fd, "address": address} for fd, address in zip(fds, addresses, strict=True)]
    endpoint = {"replica": engine.endpoint.replica, "socket": str(engine.path)}
    snapshot = {"type": "snapshot", "version": 9, "routes": [{"name": "m", "endpoints": [endpoint]}]}
    await new.launch({"inherit": inherit, "snapshot": snapshot}, pass_fds=tuple(fds))
    for fd in fds:
        os.close(fd)
    assert new.addresses == list(addresses)
    await new.connect_link()
    old.say(link.Drain(grace=60))
    await new.serve(route)
    for _ in range(20):
        assert (await new.ask("POST", "/v1/completions", chat)).status == 200
    stop.set()
    await asyncio.gather(*knocking)
    assert served > 4
    assert old.process.returncode is None  # its stream is still open
    go.set()
    assert [c async for c in stream.chunks()][-1] == b"data: [DONE]\n\n"
    async with asyncio.timeout(10):
        assert await old.process.wait() == 0
    assert new.admin.exists()
    assert (await new.ask("GET", "/health", unix=True)).status == 200
    await new.stop()


async def test_readiness_waits_for_the_first_snapshot(new_gate):
    gate = await new_gate()
    assert (await gate.ask("GET", "/ready")).status == 503
    assert (await gate.ask("GET", "/health")).status == 200
    await gate.serve()
    assert (await gate.ask("GET", "/ready")).status == 200


async def test_garbage_on_the_link_breaks_nothing(gate):
    await gate.serve()
    gate._link[1].write(b'{"type":"snapshot","version":1,"pepper":"zz"}\nnot json\n{"type":"what"}\n')
    await gate.serve(link.Route(name="m"))
    assert (await gate.ask("GET", "/v1/models/m")).status == 200
