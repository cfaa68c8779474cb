"""What clients may send: framing, limits, time, and answers to everything that is wrong."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from pierhead.gateway import link
from pierhead.gateway.incoming import Incoming

GOOD = b'{"model":"m"}'


@pytest.fixture
async def served(gate, new_engine):
    """A gateway whose model ``m`` echoes the size of the body."""

    async def answer(call):
        await call.json({"size": len(call.body), "head": call.head.decode()})

    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    gate.engine = engine
    return gate


@pytest.mark.parametrize("kind", ["", "Content-Type: application/x-www-form-urlencoded\r\n"])
async def test_an_engine_is_told_that_it_gets_json_whatever_the_client_says(served, kind):
    wire = await served.wire()
    await wire.send(post(f"{kind}Content-Length: 13\r\n", GOOD))
    head = (await wire.answer()).json()["head"].lower()
    assert [line for line in head.split("\r\n") if "content-type" in line] == ["content-type: application/json"]


def post(extra: str, body: bytes = b"", path: str = "/v1/completions", host: str = "Host: localhost\r\n") -> bytes:
    return f"POST {path} HTTP/1.1\r\n{host}{extra}\r\n".encode() + body


BAD: dict[str, tuple[bytes, int]] = {
    "length and transfer-encoding": (post("Content-Length: 13\r\nTransfer-Encoding: chunked\r\n", GOOD), 400),
    "transfer-encoding and length": (post("Transfer-Encoding: chunked\r\nContent-Length: 13\r\n", GOOD), 400),
    "two equal lengths": (post("Content-Length: 13\r\nContent-Length: 13\r\n", GOOD), 400),
    "two lengths": (post("Content-Length: 13\r\nContent-Length: 14\r\n", GOOD), 400),
    "a list of lengths": (post("Content-Length: 13, 13\r\n", GOOD), 400),
    "a signed length": (post("Content-Length: +13\r\n", GOOD), 400),
    "a space before the colon": (post("Content-Length : 13\r\n", GOOD), 400),
    "an unknown coding": (post("Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"), 501),
    "identity": (post("Transfer-Encoding: identity\r\n", b""), 400),
    "a coding in disguise": (post("Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n"), 400),
    "a chunk size that is no number": (post("Transfer-Encoding: chunked\r\n", b"0x5\r\nhello\r\n0\r\n\r\n"), 400),
    "a negative chunk size": (post("Transfer-Encoding: chunked\r\n", b"-1\r\nhello\r\n0\r\n\r\n"), 400),
    "a chunk longer than it says": (post("Transfer-Encoding: chunked\r\n", b"3\r\nhello\r\n0\r\n\r\n"), 400),
    "a chunk line that ends in LF": (post("Transfer-Encoding: chunked\r\n", b"5\nhello\r\n0\r\n\r\n"), 400),
    "a folded header": (post("X: a\r\n b\r\nContent-Length: 13\r\n", GOOD), 400),
    "a bare LF": (b"POST /v1/completions HTTP/1.1\nHost: localhost\n\n", 400),
    "a bare CR": (post("X: a\rb\r\n"), 400),
    "a NUL": (post("X: a\0b\r\n"), 400),
    "an absolute target": (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a CONNECT": (b"CONNECT x:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "no host": (post("", host=""), 400),
    "two hosts": (post("Host: localhost\r\n"), 400),
    "another version": (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "a long URL": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "a URL that never ends": (b"GET /" + b"a" * 20000, 414),
    "long headers": (post("X: " + "y" * 70000 + "\r\n"), 431),
    "headers that never end": (b"GET / HTTP/1.1\r\nX: " + b"y" * 200000, 431),
    "a body over the limit": (post("Content-Length: 999999999\r\n"), 413),
    "a strange expectation": (post("Expect: 200-maybe\r\nContent-Length: 13\r\n"), 417),
    "long trailers": (post("Transfer-Encoding: chunked\r\n", b"0\r\nX: " + b"y" * 70000 + b"\r\n\r\n"), 431),
    "chunked in HTTP/1.0": (b"POST /v1/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_request_with_this_fault_is_refused_and_never_forwarded(served, name):
    raw, status = BAD[name]
    wire = await served.wire()
    await wire.send(raw)
    got = await wire.answer()
    assert got.status == status, got.body
    error = got.json()["error"]
    assert error["source"] == "gateway"
    assert error["message"]
    assert served.engine.calls == []
    assert await wire.at_eof() == b""


async def test_a_refused_request_smuggles_no_second_one(served, http):
    wire = await served.wire()
    smuggled = http("POST", "/v1/completions", GOOD)
    await wire.send(post("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + smuggled))
    assert (await wire.answer()).status == 400
    assert await wire.at_eof() == b""
    assert served.engine.calls == []


async def test_a_chunked_request_is_forwarded_with_its_length(served):
    wire = await served.wire()
    chunks = b"".join(b"1;ext=1\r\n%c\r\n" % byte for byte in GOOD)
    await wire.send(post("Transfer-Encoding: chunked\r\n", chunks + b"0\r\nX-Trailer: 1\r\n\r\n"))
    got = (await wire.answer()).json()
    assert got["size"] == len(GOOD)
    assert f"content-length: {len(GOOD)}\r\n" in got["head"]
    assert "x-trailer" not in got["head"].lower()
    await wire.send(post(f"Content-Length: {len(GOOD)}\r\n", GOOD))
    assert (await wire.answer()).status == 200


async def test_a_request_in_single_bytes_works(served, http):
    wire = await served.wire()
    for byte in http("POST", "/v1/completions", GOOD):
        await wire.send(bytes([byte]))
    assert (await wire.answer()).status == 200


async def test_expect_100_continue_is_answered_before_the_body(served):
    wire = await served.wire()
    await wire.send(post(f"Expect: 100-continue\r\nContent-Length: {len(GOOD)}\r\n"))
    assert (await wire.head()).status == 100
    await wire.send(GOOD)
    assert (await wire.answer()).status == 200


async def test_expect_100_continue_is_refused_without_reading_the_body_when_the_head_is_bad(served):
    wire = await served.wire()
    await wire.send(post(f"Expect: 100-continue\r\nContent-Length: {len(GOOD)}\r\n", path="/nowhere"))
    assert (await wire.answer()).status == 404


async def test_a_head_request_gets_no_body(served):
    wire = await served.wire()
    for _ in range(2):
        await wire.send(b"HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = await wire.answer(head_only=True)
        assert got.status == 200
        assert int(got.headers["content-length"]) > 2


async def test_http_1_0_gets_an_answer_that_ends_with_the_connection(served):
    wire = await served.wire()
    await wire.send(b"POST /v1/completions HTTP/1.0\r\nContent-Length: 13\r\n\r\n" + GOOD)
    got = await wire.answer()
    assert got.status == 200
    assert got.headers["connection"] == "close"
    assert await wire.at_eof() == b""


async def test_connection_close_is_kept(served, http):
    wire = await served.wire()
    await wire.send(http("POST", "/v1/completions", GOOD, {"connection": "close"}))
    assert (await wire.answer()).headers["connection"] == "close"
    assert await wire.at_eof() == b""


async def test_an_upgrade_is_ignored(served, http):
    headers = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQAAP__"}
    got = await served.ask("POST", "/v1/completions", GOOD, headers=headers)
    assert got.status == 200
    assert "upgrade" not in got.json()["head"].lower()


async def test_a_wrong_method_or_path_is_said_in_the_envelope(served):
    got = await served.ask("GET", "/v1/chat/completions")
    assert (got.status, got.headers["allow"]) == (405, "POST")
    got = await served.ask("GET", "/v1/nothing")
    assert got.status == 404
    assert got.json()["error"]["code"] == "unknown_url"


async def test_slow_headers_and_slow_bodies_time_out(new_gate):
    gate = await new_gate(header_timeout=1.0, body_timeout=1.0, idle_timeout=2.0)
    await gate.serve(link.Route(name="m"))
    for raw in (b"POST /v1/completions HTTP/1.1\r\nHost: loc", post("Content-Length: 100\r\n", b"{")):
        wire = await gate.wire()
        await wire.send(raw)
        assert (await wire.answer()).status == 408
        assert await wire.at_eof() == b""
    wire = await gate.wire()
    assert await wire.at_eof() == b""  # nothing sent: the idle time ends it


async def test_connections_over_the_limit_are_told_so(new_gate):
    gate = await new_gate(max_connections=3)
    wires = [await gate.wire() for _ in range(3)]
    for wire in wires:
        await wire.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await wire.answer()).status == 200
    wire = await gate.wire()
    assert (await wire.answer()).status == 503


async def test_a_request_id_comes_back_and_goes_on_unless_it_is_odd(served):
    got = await served.ask("POST", "/v1/completions", GOOD, headers={"x-request-id": "abc-1"})
    assert got.headers["x-request-id"] == "abc-1"
    assert "x-request-id: abc-1\r\n" in got.json()["head"]
    got = await served.ask("POST", "/v1/completions", GOOD, headers={"x-request-id": "a b\tc"})
    assert got.headers["x-request-id"].startswith("req_")


async def test_docker_model_runners_paths_answer(new_gate, new_engine):
    async def answer(call):
        await call.json({"target": call.head.split()[1].decode()})

    gate: Any = await new_gate()
    engine = await new_engine(answer)
    docker = {"id": "sha256:1", "tags": ["ai/m:latest"], "created": 1}
    routes = link.Route(name="ai/m", endpoints=(engine.endpoint,), card={"created": 5}, docker=docker, aliases=("m",))
    await gate.serve(routes)
    for prefix in ("/v1", "/engines/v1", "/engines/llama.cpp/v1"):
        got = await gate.ask("POST", f"{prefix}/chat/completions", GOOD)
        assert got.json() == {"target": "/v1/chat/completions"}
        listed = (await gate.ask("GET", f"{prefix}/models")).json()
        assert listed["object"] == "list"
        assert listed["data"][0] == {"id": "ai/m", "object": "model", "created": 5, "owned_by": "pierhead"}
        assert (await gate.ask("GET", f"{prefix}/models/ai/m")).json()["id"] == "ai/m"
    assert (await gate.ask("GET", "/models")).json()[0] == docker
    assert (await gate.ask("GET", "/models/ai/m")).json() == docker
    assert (await gate.ask("GET", "/models/m")).json() == docker
    assert (await gate.ask("GET", "/v1/models/ai%2Fm")).status == 200
    assert (await gate.ask("GET", "/models/none")).json()["error"]["code"] == "model_not_found"
    for path in ("/v1/rerank", "/v1/embeddings"):
        assert (await gate.ask("POST", path, GOOD)).json() == {"target": path}


async def test_many_pipelined_local_requests_from_a_client_that_does_not_read_stay_bounded(served, http):
    wire = await served.wire(limit=1024)
    wire.writer.transport.pause_reading()
    one = http("GET", "/v1/models")

    async def flood() -> None:
        for _ in range(300):
            await wire.send(one * 1000)

    with pytest.raises(TimeoutError):  # it is slowed down: the gateway stopped reading
        async with asyncio.timeout(3):
            await flood()
    assert (await served.ask("GET", "/health")).status == 200


async def test_a_thousand_clients_at_once_connect_though_the_gateway_is_busy(gate):
    await gate.serve()
    os.kill(gate.pid, signal.SIGSTOP)  # so nothing is accepted: all must wait in the kernel's queue
    try:
        async with asyncio.timeout(20):
            opened = await asyncio.gather(
                *(asyncio.open_connection("127.0.0.1", gate.port) for _ in range(1000)), return_exceptions=True
            )
    finally:
        os.kill(gate.pid, signal.SIGCONT)
    writers = [one[1] for one in opened if not isinstance(one, BaseException)]
    for reader, writer in (one for one in opened if not isinstance(one, BaseException)):
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(20):
            assert b" 200 " in await reader.readline()
    for writer in writers:
        writer.close()
    assert len(writers) == 1000


async def test_a_body_in_the_smallest_chunks_leaves_turns_to_others_and_arrives(served, http):
    text = b"x" * 200_000
    body = b'{"model":"m","text":"%b"}' % text
    raw = post("Transfer-Encoding: chunked\r\n") + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    wire, other = await served.wire(unix=True), await served.wire(unix=True)
    sending = asyncio.create_task(wire.send(raw))
    answered = 0
    answer = asyncio.create_task(wire.answer())
    while not answer.done():
        await other.send(http("GET", "/health"))
        assert (await other.answer()).status == 200
        answered += 1
    await sending
    assert (await answer).json()["size"] == len(body)
    assert answered > 30  # 1.2 MB: five reads


def test_a_body_in_single_bytes_takes_no_more_memory_than_it_has():
    whole = Incoming(None, limit=10**6, max_trailer=100, skeleton=False)
    rest = b"".join(b"2\r\nab\r\n" for _ in range(100_000)) + b"0\r\n\r\nnext"
    while not whole.done:
        rest = whole.feed(rest)
    assert rest == b"next"
    assert b"".join(whole.pieces) == b"ab" * 100_000
    assert len(whole.pieces) == 4
    drops = Incoming(100_000, limit=10**6, max_trailer=100, skeleton=False)
    for _ in range(100_000):
        assert drops.feed(b"x") == b""
    assert drops.done
    assert [len(p) for p in drops.pieces] == [65536, 34464]
