"""One request in, one request out: what the gateway sends an engine is read again by another, strict parser (h11).

Whatever bytes a client sends, the engine must get whole, well-formed requests, each of them one that the client meant
and each answered to it once. What the client meant is what h11 reads out of the same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from typing import Any

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pierhead.gateway import link

BODY = b'{"model":"m"}'
GOOD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-N: %d\r\nContent-Length: 13\r\n\r\n" + BODY
EVIL = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Evil: 1\r\nContent-Length: 13\r\n\r\n" + BODY


def meant(raw: bytes) -> list[tuple[bytes, bytes]]:
    """The (target, body) of each whole request that h11 reads in ``raw``; empty lines between them are allowed."""
    conn = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    conn.receive_data(raw.lstrip(b"\r\n"))
    conn.receive_data(b"")
    found: list[tuple[bytes, bytes]] = []
    target, body = b"", b""
    while True:
        try:
            event = conn.next_event()
        except h11.RemoteProtocolError as exc:
            return found + meant(conn.trailing_data[0]) if "no request line" in str(exc) else found
        if isinstance(event, h11.Request):
            target, body = event.target, b""
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            found.append((target, body))
            try:
                conn.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                conn.send(h11.EndOfMessage())
                conn.start_next_cycle()
            except h11.LocalProtocolError:  # the connection was to end here
                return found
        else:
            return found


class Strict:
    """An engine that keeps every byte it gets and answers as h11 understands it."""

    def __init__(self) -> None:
        self.streams: list[bytes] = []
        self.got: list[tuple[str, bytes, bytes]] = []  # request id, target, body
        self.errors: list[str] = []
        self.server: asyncio.Server | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conn = h11.Connection(h11.SERVER)
        request, body = None, b""
        try:
            while True:
                event = conn.next_event()
                if event is h11.NEED_DATA:
                    data = await reader.read(65536)
                    self.check(data)
                    conn.receive_data(data)
                elif isinstance(event, h11.Request):
                    request, body = event, b""
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    assert request is not None
                    self.got.append((dict(request.headers)[b"x-request-id"].decode(), request.target, body))
                    if request.method != b"GET":
                        assert len(body) == int(dict(request.headers)[b"content-length"])
                    framing = [name for name, _ in request.headers if name in (b"content-length", b"transfer-encoding")]
                    assert framing in ([b"content-length"], [])
                    answer = conn.send(h11.Response(status_code=200, headers=[("content-length", "2")]))
                    writer.write(answer + conn.send(h11.Data(data=b"{}")) + conn.send(h11.EndOfMessage()))
                    conn.start_next_cycle()
                else:
                    return
        except (h11.RemoteProtocolError, h11.LocalProtocolError, AssertionError, KeyError) as exc:
            self.errors.append(repr(exc))
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()

    def check(self, data: bytes) -> None:
        """Stricter than h11: only CRLF ends lines, no folding, no control characters in heads."""
        head, found, _ = data.partition(b"\r\n\r\n")
        if found and re.search(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", head):
            self.errors.append(f"a head with odd bytes: {head!r}")


@pytest.fixture
async def strict(gate, folder):
    engine = Strict()
    engine.server = await asyncio.start_unix_server(engine.serve, str(folder / "strict.sock"))
    endpoint = link.Endpoint(replica="s", socket=str(folder / "strict.sock"))
    control = str(folder / "strict.sock")
    await gate.serve(link.Route(name="m", endpoints=(endpoint,)), control_socket=control)
    gate.strict = engine
    yield gate
    engine.server.close()


def talk(gate: Any, raw: bytes, cuts: tuple[int, ...] = ()) -> bytes:
    """All that the gateway answers to ``raw``, sent in pieces and ended."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(gate.data))
        data = b""
        with contextlib.suppress(ConnectionError):
            for start, end in zip((0, *cuts), (*cuts, len(raw)), strict=True):
                sock.sendall(raw[start:end])
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while got := sock.recv(65536):
                data += got
        return data


def judge(gate: Any, raw: bytes, cuts: tuple[int, ...] = ()) -> int:
    """Send ``raw`` and check all properties; how many requests the engine got."""
    engine = gate.strict
    engine.got.clear()
    answers = talk(gate, raw, cuts)
    assert engine.errors == [], (raw, engine.errors)
    ids = re.findall(rb"HTTP/1.1 200 [^\r]*\r\n(?:[^\r]+\r\n)*?x-request-id: ([^\r]+)\r\n", answers)
    sent = [number for number, _, _ in engine.got]
    assert len(sent) == len(set(sent)), raw
    assert {i.decode() for i in ids} >= set(sent), (raw, answers)
    wanted = meant(raw)
    place = 0
    for _, target, body in engine.got:  # in order, each one that the client meant
        while place < len(wanted) and wanted[place] != (target, body):
            place += 1
        assert place < len(wanted), (raw, engine.got, wanted)
        place += 1
    return len(engine.got)


def head(*lines: bytes, first: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
    return b"\r\n".join((first, b"Host: localhost", *lines)) + b"\r\n\r\n"


# Attacks of the field: what one reader takes for a body, another takes for a request. None may reach an engine.
ATTACKS = {
    "CL.TE": head(b"Content-Length: %d" % (5 + len(EVIL)), b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + EVIL,
    "TE.CL": head(b"Transfer-Encoding: chunked", b"Content-Length: 4") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(EVIL), EVIL),
    "two TE": head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity") + b"0\r\n\r\n" + EVIL,
    "TE twice": head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + EVIL,
    "TE list": head(b"Transfer-Encoding: chunked, identity") + b"0\r\n\r\n" + EVIL,
    "TE quoted": head(b'Transfer-Encoding: "chunked"') + b"0\r\n\r\n" + EVIL,
    "TE tab": head(b"Transfer-Encoding:\tchunked\x0b") + b"0\r\n\r\n" + EVIL,
    "TE in another line": head(b"X: y\nTransfer-Encoding: chunked") + b"0\r\n\r\n" + EVIL,
    "TE after CR": head(b"X: y\rTransfer-Encoding: chunked") + b"0\r\n\r\n" + EVIL,
    "TE folded": head(b"Transfer-Encoding:\r\n chunked") + b"0\r\n\r\n" + EVIL,
    "TE space": head(b"Transfer-Encoding : chunked") + b"0\r\n\r\n" + EVIL,
    "TE before": head(b" Transfer-Encoding: chunked") + b"0\r\n\r\n" + EVIL,
    "TE underscore": head(b"Transfer_Encoding: chunked", b"Content-Length: 0") + EVIL.replace(b"X-Evil", b"X-Mine"),
    "CL underscore": head(b"Content_Length: 200", b"Content-Length: 0") + EVIL.replace(b"X-Evil", b"X-Mine"),
    "CL twice": head(b"Content-Length: 0", b"Content-Length: %d" % len(EVIL)) + EVIL,
    "CL list": head(b"Content-Length: 0, %d" % len(EVIL)) + EVIL,
    "CL plus": head(b"Content-Length: +0") + EVIL,
    "CL hex": head(b"Content-Length: 0x0") + EVIL,
    "CL underscored number": head(b"Content-Length: 1_3") + EVIL,
    "CL empty": head(b"Content-Length:") + EVIL,
    "CL huge": head(b"Content-Length: 18446744073709551616") + EVIL,
    "CL wraps": head(b"Content-Length: 4294967296") + EVIL,
    "CL NUL": head(b"Content-Length: 0\x00") + EVIL,
    "CL unicode digits": head("Content-Length: \u0660".encode()) + EVIL,
    "chunk size wraps": head(b"Transfer-Encoding: chunked") + b"10000000000000000\r\n\r\n0\r\n\r\n" + EVIL,
    "chunk size space": head(b"Transfer-Encoding: chunked") + b" 0\r\n\r\n" + EVIL,
    "chunk size empty": head(b"Transfer-Encoding: chunked") + b"\r\n\r\n" + EVIL,
    "chunk size underscored": head(b"Transfer-Encoding: chunked") + b"0_0\r\n\r\n" + EVIL,
    "chunk extension LF": head(b"Transfer-Encoding: chunked") + b"2;\nxx\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(EVIL), EVIL),
    "chunk extension CR": head(b"Transfer-Encoding: chunked") + b"2;a\rb\r\nxx\r\n0\r\n\r\n" + EVIL,
    "chunk extension long": head(b"Transfer-Encoding: chunked") + b"2;" + b"a" * 5000 + b"\r\nxx\r\n0\r\n\r\n" + EVIL,
    "chunk data without its end": head(b"Transfer-Encoding: chunked") + b"2\r\nxx0\r\n\r\n" + EVIL,
    "chunk ends in LF": head(b"Transfer-Encoding: chunked") + b"2\r\nxx\n0\r\n\r\n" + EVIL,
    "trailer bare LF": head(b"Transfer-Encoding: chunked") + b"0\r\nA: b\n\r\n" + EVIL,
    "trailer smuggles": head(b"Transfer-Encoding: chunked") + b"0\r\n" + EVIL,
    "bare LF head": head().replace(b"\r\n", b"\n") + EVIL,
    "bare CR head": head().replace(b"\r\n", b"\r") + EVIL,
    "name with a space": head(b"Content Length: 13") + EVIL,
    "no name": head(b": 13") + EVIL,
    "no colon": head(b"Content-Length 13") + EVIL,
    "name with a NUL": head(b"Content-Length\x00: 13") + EVIL,
    "a request of version 0.9": b"GET /v1/models\r\n\r\n" + EVIL,
    "a request of version 1.2": head(first=b"POST /v1/completions HTTP/1.2") + EVIL,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + EVIL,
    "absolute": head(first=b"POST http://evil/v1/completions HTTP/1.1") + EVIL,
    "authority": head(first=b"CONNECT evil:80 HTTP/1.1") + EVIL,
    "space in the target": head(first=b"POST /v1/completions HTTP/1.1 /x HTTP/1.1") + EVIL,
    "tab in the first line": head(first=b"POST\t/v1/completions\tHTTP/1.1") + EVIL,
    "CR in the target": head(first=b"POST /v1/completions\r HTTP/1.1") + EVIL,
    "lower case version": head(first=b"POST /v1/completions http/1.1") + EVIL,
    "two hosts": head(b"Host: evil") + EVIL,
    "1000 headers in one": head(b"X: " + b"a" * 70000) + EVIL,
    "70 kB of headers": head(*[b"X-%d: y" % n for n in range(9000)]) + EVIL,
}
HARMLESS = ("TE underscore", "CL underscore")  # two requests, both meant


async def test_no_attack_of_the_field_reaches_an_engine(strict):
    for name, raw in ATTACKS.items():
        count = await asyncio.to_thread(judge, strict, raw)
        assert count == (1 if name in HARMLESS else 0), name  # the first of these names no model
        assert await asyncio.to_thread(judge, strict, GOOD % 1) == 1, name


async def test_what_follows_a_refused_request_is_read_at_its_true_place(strict):
    """A body that is refused because of its head is skipped by its length, never taken for a request."""
    refused = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(EVIL) + EVIL
    wrong = b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(EVIL) + EVIL
    local = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(EVIL) + EVIL
    chunked = head(b"Transfer-Encoding: chunked", first=b"GET /health HTTP/1.1")
    chunked += b"%x\r\n%b\r\n0\r\n\r\n" % (len(EVIL), EVIL)
    for bad in (refused, wrong, local, chunked):
        for cut in (0, len(bad) // 2, len(bad) - 1):
            assert await asyncio.to_thread(judge, strict, bad * 2 + GOOD % 1, (cut,)) == 1
    big = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000 + EVIL
    assert await asyncio.to_thread(judge, strict, big) == 0
    expect = head(b"Expect: 100-continue", b"Content-Length: 13", first=b"POST /nowhere HTTP/1.1") + EVIL
    assert await asyncio.to_thread(judge, strict, expect) == 0


async def test_a_target_goes_on_as_it_came_or_not_at_all(strict):
    for target in (
        b"/api/v1/x?a=b&c=%20",
        b"/api/v1/%2e%2e/x",
        b"/api/v1/x;y",
        b"/api/v1//x",
        b"/api/v1/x?" + b"a" * 900,
    ):
        raw = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % target
        assert await asyncio.to_thread(judge, strict, raw) == 1
    for target in (b"/api/v1/x y", b"/api/v1/\xffx", b"/api/v1/\x00", b"/api/v1/\x7f", b"*", b"api/v1", b"/api/v1/x#y"):
        raw = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % target
        assert await asyncio.to_thread(judge, strict, raw) in (0, 1)


# --- arbitrary combinations -----------------------------------------------------------------------------------------

eol = st.sampled_from([b"\r\n"] * 60 + [b"\n", b"\r", b"\r\r\n", b"\n\n", b"\r\n\r\n"])
space = st.sampled_from([b" "] * 30 + [b"", b"\t", b"  ", b"\x0b", b"\xa0"])
names = st.sampled_from(
    [b"Content-Length", b"X-A"] * 4
    + [b"Transfer-Encoding", b"transfer-encoding", b"Content-Length ", b" Transfer-Encoding", b"Content_Length"]
    + [b"X-A", b"Host", b"Connection", b"Expect", b"Upgrade", b"TE", b"Trailer", b"X\x00", b"", b"Keep-Alive"]
)
values = st.sampled_from(
    [b"13", b"chunked"] * 6
    + [b"0", b"5", b"+13", b"13, 13", b"0x0d", b"013", b"", b"Chunked", b"identity", b"gzip, chunked", b"chunked;q=1"]
    + [b"close", b"keep-alive", b"content-length", b"transfer-encoding, close", b"100-continue", b"localhost", b"h2c"]
    + [b"a\rb", b"a\x00", b"\xe9"]
)
lines = st.lists(st.tuples(names, st.sampled_from([b":"] * 30 + [b"", b"::", b" :"]), space, values, eol), max_size=3)
firsts = st.sampled_from(
    [b"POST /v1/completions HTTP/1.1"] * 6
    + [b"POST /v1/completions HTTP/1.0", b"POST  /v1/completions HTTP/1.1", b"POST /nowhere HTTP/1.1"]
    + [b"GET /health HTTP/1.1", b"HEAD /v1/models HTTP/1.1", b"OPTIONS * HTTP/1.1"]
    + [b"GET /api/v1/x HTTP/1.1", b"POST /api/v1/x HTTP/1.1"]
)
sizes = st.sampled_from([b"d", b"D", b"0d", b"d;a", b'd;a="\r"', b"d ", b" d", b"0xd", b"-d", b"e", b"c", b"", b"d;\n"])
ends = st.sampled_from([b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b"0\r\nA\r\n\r\n", b"00\r\n\r\n", b""])
chunked = st.tuples(sizes, eol, st.just(BODY), eol, ends).map(b"".join)
bodies = st.one_of(
    chunked, st.sampled_from([BODY, BODY, b"", EVIL, BODY + EVIL, b"0\r\n\r\n"]), st.binary(max_size=20)
)  # fmt: skip
hosts = st.sampled_from([b"Host: localhost\r\n"] * 30 + [b""])


sane = st.sampled_from(
    [GOOD % 1, head(b"Transfer-Encoding: chunked") + b"d;a=b\r\n" + BODY + b"\r\n0\r\n\r\n", head(b"Content-Length: 0")]
)


@st.composite
def odd(draw: Any) -> bytes:
    text = draw(firsts) + draw(eol) + draw(hosts)
    for line in draw(lines):
        text += b"".join(line)
    return text + draw(eol) + draw(bodies)


async def test_any_mixture_of_requests_reaches_the_engine_as_what_was_meant(strict):
    forwarded = 0

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(odd() | sane, min_size=1, max_size=3), st.lists(st.integers(0, 400), max_size=3))
    def play(parts: list[bytes], cuts: list[int]) -> None:
        nonlocal forwarded
        raw = b"".join(parts) + GOOD % 7
        forwarded += judge(strict, raw, tuple(sorted(min(cut, len(raw)) for cut in cuts)))

    async with asyncio.timeout(60):
        await asyncio.to_thread(play)
    assert forwarded > 100  # the mixture is not all nonsense
