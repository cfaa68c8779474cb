"""Whatever breaks off, at whatever byte: afterwards no socket, task, hold or open count is left. Counted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import re
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest

from pierhead.gateway import link

COUNTS = ("gateway_connections_open", "gateway_relays_open", "gateway_holds_open", "gateway_tasks",
          "gateway_body_bytes", "replica_requests_open")  # fmt: skip
KEY = "sk-leaks"
PEPPER = "00" * 32
MAC = hmac.digest(bytes.fromhex(PEPPER), KEY.encode(), hashlib.sha256).hex()
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":"hi"},"finish_reason":null}]}\n\n'  # noqa: E501
LAST = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'  # noqa: E501
WHOLE = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }
).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


ANSWERS = {
    "whole": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE),
    "chunked": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunk(WHOLE[:100]) + chunk(WHOLE[100:]) + b"0\r\n\r\n",
    "events": SSE + chunk(EVENT) + chunk(LAST) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
    "error": b"HTTP/1.1 400 X\r\nContent-Type: application/json\r\nContent-Length: 31\r\n\r\n"
    + b'{"error":{"message":"no such"}}',
}  # fmt: skip


async def counts(gate: Any) -> dict[str, float]:
    """What the gateway holds, as its metrics tell; the asking connection is part of it."""
    text = (await gate.ask("GET", "/metrics", unix=True)).body.decode()
    found = dict.fromkeys(COUNTS, 0.0)
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0].removeprefix("pierhead_")
        if name in found:
            found[name] += float(line.rpartition(" ")[2])
    return found


async def settles(gate: Any, before: dict[str, float], **only: float) -> None:
    """Wait until nothing more is held than before, or until these counts are reached."""
    now = dict[str, float]()
    for _ in range(200):
        now = await counts(gate)
        if now == before if not only else now.items() >= only.items():
            return
        await asyncio.sleep(0.05)
    assert now == before


def reset(sock: socket.socket) -> None:
    """Close with a reset, as a killed machine's kernel answers."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def dial(gate: Any) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", gate.port), 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


@pytest.fixture
async def leaky(gate, new_engine):
    """A gateway with one scripted engine: ``X-Kind`` says how it answers, ``X-Cut`` after how many bytes it resets,
    ``X-Hold`` after how many it waits for the gateway to hang up.
    """

    async def answer(call):
        told = re.search(rb"kind=(\w+) cut=(\d+)", call.body)  # where a translation keeps headers back
        kind, cut = told.groups() if told else (None, None)
        raw = ANSWERS[kind.decode() if kind else call.headers.get("x-kind", "whole")]
        cut, hold = cut or call.headers.get("x-cut"), call.headers.get("x-hold")
        if cut is not None:
            await call.send(raw[: int(cut)])
            call.reset()
            raise ConnectionResetError
        if hold is not None:
            await call.send(raw[: int(hold)])
            await call.reader.read()
            raise ConnectionResetError
        await call.send(raw)

    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    await gate.ask("POST", "/v1/chat/completions", {"model": "m", "messages": [{}]})
    gate.engine = engine
    return gate


async def all_at_once(jobs: list[Callable[[], None]]) -> None:
    """Blocking clients in threads, sixteen at a time."""
    slots = asyncio.Semaphore(16)

    async def one(job: Callable[[], None]) -> None:
        async with slots:
            await asyncio.to_thread(job)

    async with asyncio.timeout(30):
        await asyncio.gather(*(one(job) for job in jobs))


BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
REQUESTS = {
    "length": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
    % (len(BODY), BODY),
    "chunked": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunk(BODY[:20]) + chunk(BODY[20:]) + b"0\r\nA: b\r\n\r\n",
    "expect": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: "
    b"%d\r\n\r\n%b" % (len(BODY), BODY),
}  # fmt: skip


@pytest.mark.parametrize("how", ["reset", "close", "half-close"])
@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_client_that_breaks_off_at_any_byte_of_its_request_leaves_nothing(leaky, kind, how):
    raw = REQUESTS[kind]
    before, files = await counts(leaky), fds(leaky.pid)

    def leave(size: int) -> None:
        sock = dial(leaky)
        sock.sendall(raw[:size])
        if how == "half-close":
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        reset(sock) if how == "reset" else sock.close()

    await all_at_once([lambda size=size: leave(size) for size in range(len(raw) + 1)])
    await settles(leaky, before)
    assert fds(leaky.pid) <= files + 16  # idle connections to the engine, as many as there were clients


# What is asked, and what a stream of it ends with; all but the first are translated to chat.
ASKED: dict[str, tuple[dict[str, Any], bytes]] = {
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "TELL"}]}, b"[DONE]"),
    "/v1/messages": ({"messages": [{"role": "user", "content": "TELL"}], "max_tokens": 9}, b"message_stop"),
    "/v1/responses": ({"input": "TELL", "store": False}, b"response.completed"),
    "/api/chat": ({"messages": [{"role": "user", "content": "TELL"}]}, b'"done":true'),
}


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("kind", ANSWERS)
async def test_an_engine_that_resets_at_any_byte_of_its_answer_leaves_nothing(leaky, http, kind, path):
    before = await counts(leaky)
    raw = ANSWERS[kind]
    body = json.dumps(ASKED[path][0] | {"model": "m", "stream": kind == "events"}).encode()
    ended: list[bytes] = []

    def one(size: int) -> None:
        with dial(leaky) as sock:
            sock.sendall(http("POST", path, body.replace(b"TELL", b"kind=%b cut=%d" % (kind.encode(), size))))
            sock.shutdown(socket.SHUT_WR)
            data = b""
            while got := receive(sock):
                data += got
            ended.append(data)

    steps = [*range(0, len(raw), 1 if path == "/v1/chat/completions" else 7), len(raw)]
    await all_at_once([lambda size=size: one(size) for size in steps])
    await settles(leaky, before)
    assert len(ended) == len(steps)
    assert kind != "events" or any(ASKED[path][1] in data for data in ended)  # the last one came whole
    for data in ended:  # nobody may take a part for the whole
        last = data.rpartition(b"HTTP/1.1 ")[2]
        assert last.startswith((b"502", b"200", b"400")) or not last
        if last.startswith(b"200") and last.endswith(b"0\r\n\r\n"):
            told = (ASKED[path][1], b'"error"', b"response.failed") if kind == "events" else (WHOLE[-20:],)
            assert any(word in last for word in told)


async def test_what_a_key_was_granted_comes_back_however_its_requests_end(new_gate, new_engine, http):
    async def answer(call):
        raw = ANSWERS[call.headers.get("x-kind", "whole")]
        cut = call.headers.get("x-cut")
        await call.send(raw if cut is None else raw[: int(cut)])
        if cut is not None:
            call.reset()
            raise ConnectionResetError

    gate = await new_gate(require_key=True)
    engine = await new_engine(answer)
    route = link.Route(name="m", endpoints=(engine.endpoint,))

    async def allow(concurrent: int) -> None:
        grants = link.Grants(rpm=10**6, tpm=10**9, concurrent=concurrent, budgets=(link.Budget(10**9),))
        await gate.serve(route, keys=(link.Key("k", MAC, grants=grants),), pepper=PEPPER)

    await allow(64)
    before = await counts(gate)
    given = {"authorization": f"Bearer {KEY}"}
    kinds = list(ANSWERS)

    def one(number: int) -> None:
        kind = kinds[number % 4]
        cut = {"x-cut": str(number * 7 % len(ANSWERS[kind]))} if number % 3 else {}
        sock = dial(gate)
        sock.settimeout(0.02)
        sock.sendall(http("POST", "/v1/chat/completions", BODY, given | {"x-kind": kind} | cut))
        if number % 5:
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                sock.recv(65536)
        reset(sock) if number % 2 else sock.close()

    await all_at_once([lambda number=number: one(number) for number in range(600)])
    await settles(gate, before)
    await allow(1)  # one more than are under way
    assert (await gate.ask("POST", "/v1/chat/completions", json.loads(BODY), headers=given)).status == 200
    await settles(gate, before)


def receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize("kind", ANSWERS)
async def test_a_client_that_leaves_at_any_byte_of_the_answer_frees_the_engine_and_leaves_nothing(
    leaky, http, kind, how
):
    before = await counts(leaky)
    raw = ANSWERS[kind]
    leaky.engine.calls.clear()
    steps = range(0, len(raw), 3)

    def one(size: int) -> None:
        sock = dial(leaky)
        sock.sendall(http("POST", "/v1/chat/completions", BODY, {"x-kind": kind, "x-hold": str(size)}))
        sock.settimeout(0.02)
        deadline = time.monotonic() + 20  # what is reset before it was read was never asked
        while not any(call.headers.get("x-hold") == str(size) for call in list(leaky.engine.calls)):
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                sock.recv(65536)
        reset(sock) if how == "reset" else sock.close()

    await all_at_once([lambda size=size: one(size) for size in steps])
    await settles(leaky, before)
    assert sum(call.head.startswith(b"POST") for call in leaky.engine.calls) == len(steps)


async def test_slow_writers_and_slow_readers_are_cut_off_and_leave_nothing(new_gate, new_engine, http):
    async def answer(call):
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 40000000\r\n\r\n")
        for _ in range(40):
            await call.send(b"x" * 1_000_000)

    gate = await new_gate(header_timeout=1.0, body_timeout=1.0, idle_timeout=1.0, write_timeout=1.0)
    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    before = await counts(gate)
    head = http("POST", "/v1/chat/completions", BODY)
    chunked = REQUESTS["chunked"]
    starts = [
        b"",
        head[:20],
        head[:-20],
        chunked[:100],
        chunked[:-3],
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n",
    ]

    async def drip(raw: bytes) -> None:
        """A byte whenever the gateway has almost lost patience."""
        wire = await gate.wire()
        await wire.send(raw)
        async with asyncio.timeout(15):
            while True:
                try:
                    async with asyncio.timeout(0.3):
                        if not await wire.reader.read(65536):
                            return
                except TimeoutError:
                    wire.writer.write(b"a" if raw else b"\r\n")
                except ConnectionError:
                    return

    async def dawdle() -> None:
        wire = await gate.wire(limit=1024)
        wire.writer.transport.pause_reading()
        await wire.send(head)
        async with asyncio.timeout(15):
            await engine.gone.get()

    await asyncio.gather(*(drip(raw) for raw in starts for _ in range(5)), *(dawdle() for _ in range(5)))
    await settles(gate, before)


async def test_a_thousand_streams_that_end_in_every_way_leave_memory_and_files_as_they_were(leaky, http):
    before, files = await counts(leaky), fds(leaky.pid)
    kinds = list(ANSWERS)

    def one(number: int) -> None:
        kind = kinds[number % 4]
        size = (number * 7) % len(ANSWERS[kind])
        what = ({}, {"x-cut": str(size)}, {"x-hold": str(size)})[number % 3]
        sock = dial(leaky)
        sock.settimeout(0.01)
        sock.sendall(http("POST", "/v1/chat/completions", BODY, {"x-kind": kind} | what))
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            sock.recv(100)
        sock.close()

    await all_at_once([lambda number=number: one(number) for number in range(1000)])
    await settles(leaky, before)
    assert fds(leaky.pid) <= files + 16


@pytest.mark.parametrize("how", ["reset", "close", "half-close"])
async def test_requests_that_leave_while_their_model_starts_leave_nothing(gate, http, how):
    await gate.serve(link.Route(name="cold"))
    before = await counts(gate)
    socks = [dial(gate) for _ in range(50)]
    for sock in socks:
        sock.sendall(http("POST", "/v1/chat/completions", {"model": "cold", "messages": [{}]}))
    asked = await gate.next(link.EnsureReady)
    await settles(gate, before, gateway_relays_open=50.0)
    for sock in socks:
        reset(sock) if how == "reset" else sock.close() if how == "close" else sock.shutdown(socket.SHUT_WR)
    if how == "half-close":  # these still read
        error = {"code": "engine_failed", "message": "no", "http_status": 502}
        gate.say(link.StartResult(id=asked.id, error=error))
        for sock in socks:
            data = b""
            while got := await asyncio.to_thread(receive, sock):
                data += got
            assert b" 502 " in data
            sock.close()
    await settles(gate, before)
