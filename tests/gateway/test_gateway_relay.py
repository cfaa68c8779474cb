"""Requests for models: what goes to the engine, what comes back, and what happens when either side breaks."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
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


async def test_a_mistyped_model_is_told_the_closest_name_before_the_command(gate, chat):
    await gate.serve(link.Route(name="smollm2"))
    got = await gate.ask("POST", "/v1/chat/completions", chat | {"model": "smolm2"})
    assert got.json()["error"]["hint"] == "Did you mean 'smollm2'? Else type: pier pull smolm2"


async def test_a_stream_that_takes_longer_than_its_client_waits_ends_with_the_gateways_own_error(
    gate, new_engine, chat, http
):
    async def answer(call):
        await call.sse()
        await call.event({"n": 1})
        await call.reader.read()

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", chat | {"stream": True}, {"x-request-timeout": "0.3"}))
    got = await wire.answer()
    error = json.loads(got.body.split(b"\n\n")[1].removeprefix(b"data: "))["error"]
    assert (error["code"], error["source"]) == ("timeout", "gateway")
    assert error["message"].startswith("the answer took longer than 0.3 s.")


async def test_an_engine_that_dies_mid_stream_ends_the_stream_with_an_error_event(gate, new_engine, chat, http):
    async def answer(call):
        await call.sse()
        await call.event({"n": 1})
        await call.send(b'2f\r\ndata: {"half')
        call.reset()

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", chat | {"stream": True}))
    got = await wire.answer()
    events = got.body.split(b"\n\n")
    assert events[0] == b'data: {"n": 1}'
    error = json.loads(events[1].removeprefix(b"data: "))["error"]
    assert error["source"] == "engine"
    assert error["code"] == "engine_failed"
    assert events[2:] == [b""]
    assert await wire.at_eof() == b""


async def test_an_answer_cut_short_is_never_a_clean_end(gate, new_engine, chat, http):
    async def answer(call):
        await call.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"
        )
        call.close()

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", chat))
    rest = await wire.at_eof()
    assert not rest.endswith(b"0\r\n\r\n")


async def test_a_short_body_with_a_length_becomes_502_from_the_engine(gate, new_engine, chat):
    async def answer(call):
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        call.close()

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    got = await gate.ask("POST", "/v1/completions", chat)
    assert got.status == 502
    assert got.json()["error"]["source"] == "engine"


async def test_a_body_that_ends_with_the_connection_arrives_whole(gate, new_engine, chat):
    async def answer(call):
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it")
        call.close()

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    got = await gate.ask("POST", "/v1/completions", chat)
    assert got.body == b"all of it"


async def test_an_event_stream_that_ends_with_the_connection_and_without_done_gets_an_error_event(
    gate, new_engine, chat
):
    async def answer(call):
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {}\n\n")
        call.close()

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    got = await gate.ask("POST", "/v1/completions", chat)
    assert b'"source":"engine"' in got.body


async def test_interim_answers_are_skipped(gate, new_engine, chat):
    async def answer(call):
        await call.send(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        await call.json({"ok": True})

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    assert (await gate.ask("POST", "/v1/completions", chat)).json() == {"ok": True}


async def test_a_204_has_no_body_and_the_connection_goes_on(gate, new_engine, chat, http):
    async def answer(call):
        await call.send(b"HTTP/1.1 204 No Content\r\n\r\n")

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire()
    for _ in range(2):
        await wire.send(http("POST", "/v1/completions", chat))
        got = await wire.answer()
        assert got.status == 204
        assert "content-length" not in got.headers
        assert "transfer-encoding" not in got.headers


async def test_a_stale_pooled_connection_is_retried_once(gate, new_engine, chat, http):
    async def answer(call):
        if len(engine.calls) == 2:
            call.reset()
            return
        await call.json({"n": len(engine.calls)})

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire()
    for n in (1, 3):
        await wire.send(http("POST", "/v1/completions", chat))
        assert (await wire.answer()).json() == {"n": n}
    assert engine.connections == 2


async def test_nothing_is_retried_once_a_byte_came(gate, new_engine, chat, http):
    async def answer(call):
        if len(engine.calls) == 2:
            await call.send(b"HTTP/1.1 2")
            call.reset()
            return
        await call.json({"n": len(engine.calls)})

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/completions", chat))
    await wire.answer()
    await wire.send(http("POST", "/v1/completions", chat))
    assert (await wire.answer()).status == 502
    assert len(engine.calls) == 2


async def test_a_malformed_answer_is_502(gate, new_engine, chat):
    for raw in (
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nx",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000,
    ):

        async def answer(call, raw=raw):
            await call.send(raw)
            await call.reader.read()

        engine = await new_engine(answer)
        await gate.serve(route(engine))
        got = await gate.ask("POST", "/v1/completions", chat)
        assert got.status == 502, raw
        assert got.json()["error"]["source"] == "engine"


async def test_engine_errors_come_in_the_one_envelope_with_their_numbers(gate, new_engine, chat):
    async def answer(call):
        error = {"code": 400, "message": "too long", "type": "exceed_context_size_error"}
        await call.json({"error": error | {"n_prompt_tokens": 5000, "n_ctx": 2048}}, 400)

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    error = (await gate.ask("POST", "/v1/completions", chat)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["type"] == "invalid_request_error"
    assert (error["n_prompt_tokens"], error["n_ctx"], error["source"]) == (5000, 2048, "engine")


async def test_a_client_that_disconnects_cancels_the_work(new_gate, new_engine, chat, http):
    begun = asyncio.Event()

    async def answer(call):
        begun.set()
        assert await call.reader.read() == b""
        raise ConnectionResetError

    gate = await new_gate()
    engine = await new_engine(answer)
    await gate.serve(route(engine))
    for unix in (True, False):
        begun.clear()
        wire = await gate.wire(unix=unix)
        await wire.send(http("POST", "/v1/chat/completions", chat))
        await begun.wait()
        wire.writer.close()  # a FIN, as a program that exits sends it
        async with asyncio.timeout(10):
            await engine.gone.get()


async def test_a_disconnect_is_seen_behind_more_pipelined_bytes_than_are_kept(gate, new_engine, chat, http):
    begun = asyncio.Event()

    async def answer(call):
        begun.set()
        await call.reader.read()
        raise ConnectionResetError

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire(unix=True)
    await wire.send(http("POST", "/v1/chat/completions", chat))
    await begun.wait()
    wire.writer.write(http("POST", "/v1/chat/completions", b"x" * 600_000))
    await asyncio.sleep(0)
    wire.close()
    async with asyncio.timeout(10):
        await engine.gone.get()


async def test_a_half_close_is_not_a_disconnect(gate, new_engine, chat, http):
    async def answer(call):
        await asyncio.sleep(1.5)  # long enough for several looks at the client
        await call.json({"late": True})

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    for unix in (True, False):
        wire = await gate.wire(unix=unix)
        await wire.send(http("POST", "/v1/chat/completions", chat))
        wire.half_close()
        got = await wire.answer()
        assert got.json() == {"late": True}
        assert await wire.at_eof() == b""


async def test_pipelined_requests_are_answered_in_order(gate, new_engine, chat, http):
    async def answer(call):
        await call.json({"id": call.headers["x-request-id"]})

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire()
    count = 200
    batch = [http("POST", "/v1/completions", chat, {"x-request-id": f"n{i}"}) for i in range(count)]
    batch.insert(100, http("GET", "/health"))
    sender = asyncio.create_task(wire.send(b"".join(batch)))
    got = [await wire.answer() for _ in range(count + 1)]
    await sender
    assert got.pop(100).json() == {"status": "ok"}
    assert [g.json()["id"] for g in got] == [f"n{i}" for i in range(count)]
    assert [g.headers["x-request-id"] for g in got] == [f"n{i}" for i in range(count)]


async def test_a_slow_client_slows_its_engine_and_nothing_piles_up(gate, new_engine, chat, http):
    sent = 0

    async def answer(call):
        nonlocal sent
        await call.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 200000000\r\n\r\n"
        )
        call.writer.transport.set_write_buffer_limits(high=0)
        for _ in range(200):
            await call.send(b"x" * 1_000_000)
            sent += 1

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire(limit=65536)
    await wire.send(http("POST", "/v1/completions", chat))
    await wire.head()
    before = -1
    while sent != before:  # until the engine stands still
        before = sent
        await asyncio.sleep(0.3)
    assert sent < 30
    status = await asyncio.to_thread(Path(f"/proc/{gate.pid}/status").read_text)
    assert int(status.partition("VmRSS:")[2].split()[0]) < 200_000
    total = 0
    async with asyncio.timeout(60):
        while total < 200_000_000:
            total += len(await wire.reader.read(1 << 20))
    assert total == 200_000_000


async def test_a_client_that_never_reads_is_cut_off(new_gate, new_engine, chat, http):
    async def answer(call):
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n")
        for _ in range(200):
            await call.send(b"x" * 1_000_000)

    gate = await new_gate(write_timeout=1.0)
    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire(limit=1024)
    wire.writer.transport.pause_reading()
    await wire.send(http("POST", "/v1/completions", chat))
    async with asyncio.timeout(15):
        await engine.gone.get()


async def test_headers_that_concern_one_hop_stay_there(gate, new_engine, chat):
    async def answer(call):
        raw = b"HTTP/1.1 200 OK\r\nConnection: x-hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nX-Keep: 1\r\n"
        await call.send(raw + b"Access-Control-Allow-Origin: *\r\nContent-Length: 0\r\n\r\n")

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    given = {"connection": "x-mine", "x-mine": "1", "te": "trailers", "authorization": "Bearer secret", "x-end": "1"}
    got = await gate.ask("POST", "/v1/completions", chat, headers=given | {"cookie": "a=b"})
    assert not {"x-hop", "keep-alive", "access-control-allow-origin"} & set(got.headers)
    assert got.headers["x-keep"] == "1"
    seen = engine.calls[0].headers
    assert not {"x-mine", "te", "authorization", "cookie", "connection"} & set(seen)
    assert seen["x-end"] == "1"


async def test_model_is_read_as_json(gate, new_engine):
    async def answer(call):
        await call.json({"by": "m"})

    engine = await new_engine(answer)
    await gate.serve(route(engine, aliases=("also",)))
    for body, status in (
        (b'{"messages":[{"content":"\\"model\\":\\"x\\""}],"\\u006dodel":"\\u006d"}', 200),
        (b'{"model":"gone","model":"m"}', 200),
        (b'{"model":"m","model":"gone"}', 404),
        (b'{"inner":{"model":"m"},"model":"also"}', 200),
        (b'{"inner":{"model":"m"}}', 400),
        (b'{"model":7}', 400),
        (b'["model"]', 400),
        (b'{"model":"m"', 400),
        (b"", 400),
        (b'{"a":' + b"[" * 60000, 400),
    ):
        got = await gate.ask("POST", "/v1/completions", body)
        assert got.status == status, (body[:80], got.body)


async def test_a_large_body_is_forwarded_as_it_came(gate, new_engine):
    async def answer(call):
        await call.json({"size": len(call.body)})

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    body = json.dumps({"image": "A" * 5_000_000, "text": 'q"\\' * 20000, "model": "m"}).encode()
    assert (await gate.ask("POST", "/v1/chat/completions", body)).json() == {"size": len(body)}
    assert engine.calls[0].body == body


async def test_a_20_mb_image_delays_other_streams_little(gate, new_engine, chat, http):
    stop = asyncio.Event()

    async def answer(call):
        if len(call.body) > 1_000_000:
            await call.json({})
            return
        await call.sse()
        while not stop.is_set():
            await call.event({})
            await asyncio.sleep(0.001)
        await call.event(b"[DONE]")
        await call.end()

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    wire = await gate.wire()
    await wire.send(http("POST", "/v1/chat/completions", chat))
    await wire.head()
    body = http("POST", "/v1/chat/completions", {"image": "A" * 20_000_000, "model": "m"})
    big = await gate.wire(unix=True)
    upload = asyncio.create_subprocess_exec(
        "python3", "-c",
        "import socket,sys;s=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1]);s.sendall(sys.stdin.buffer.read());"
        "print(s.recv(15).decode())",
        str(gate.data), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    big.close()
    process = await upload
    done = asyncio.create_task(process.communicate(body))
    async for _ in wire.chunks():
        if done.done():
            break
    # The scripted engine shares this test's loop, and the machine has other work: the gateway's own part counts.
    text = (await gate.ask("GET", "/metrics", unix=True)).body.decode()
    stop.set()
    assert b"200" in (await done)[0]
    assert 0 <= float(re.search(r"^pierhead_gateway_loop_busy_lag_seconds (\S+)", text, re.MULTILINE)[1]) < 0.01


async def test_an_engine_behind_a_loopback_port_is_reached_and_reconnected_to(gate, new_engine):
    async def answer(request):
        await request.json({"id": "x"})

    engine = await new_engine(answer)
    server = await asyncio.start_server(engine._serve, "127.0.0.1", 0)
    async with server:
        place = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await gate.serve(link.Route(name="m", endpoints=(link.Endpoint(replica="r", socket=place),)))
        for _ in range(3):
            found = await gate.ask("POST", "/v1/chat/completions", {"model": "m", "messages": [{}]})
            assert (found.status, found.json()) == (200, {"id": "x"})
        assert engine.connections == 1


async def test_a_request_that_chooses_a_tool_uses_the_open_connection(gate, new_engine):
    async def answer(request):
        await request.json({"id": "x"})

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    for choice in ("auto", {"type": "function", "function": {"name": "b"}}, "auto"):
        assert (await gate.ask("POST", "/v1/chat/completions", body | {"tool_choice": choice})).status == 200
    assert engine.connections == 1
    seen = [json.loads(call.body) for call in engine.calls]
    assert [len(s["tools"]) for s in seen] == [2, 1, 2]
    assert [s["tool_choice"] for s in seen] == ["auto", "required", "auto"]
    missing = body | {"tool_choice": {"type": "function", "function": {"name": "c"}}}
    assert (await gate.ask("POST", "/v1/chat/completions", missing)).status == 400
    large = body | {"messages": [{"role": "user", "content": "x" * 300_000}], "tool_choice": "auto"}
    assert (await gate.ask("POST", "/v1/chat/completions", large)).status == 200
    assert len(json.loads(engine.calls[-1].body)["messages"][0]["content"]) == 300_000


async def test_a_translated_request_uses_the_open_connection(gate, new_engine):
    async def answer(request):
        message = {"role": "assistant", "content": "hi"}
        await request.json({"id": "x", "choices": [{"index": 0, "finish_reason": "stop", "message": message}]})

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    body = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    for _ in range(3):
        assert (await gate.ask("POST", "/v1/messages", body)).status == 200
    assert engine.connections == 1


async def test_a_translated_request_survives_an_open_connection_that_had_gone_stale(gate, new_engine):
    async def answer(request):
        message = {"role": "assistant", "content": "hi"}
        await request.json({"id": "x", "choices": [{"index": 0, "finish_reason": "stop", "message": message}]})
        if len(engine.calls) == 1:
            await request.reader.readuntil(b"\r\n\r\n")  # the next request, which this connection never answers
            request.reset()

    engine = await new_engine(answer)
    await gate.serve(route(engine))
    body = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    for _ in range(2):
        assert (await gate.ask("POST", "/v1/messages", body)).status == 200
    assert engine.connections == 2
