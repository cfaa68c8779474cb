"""Arbitrary bytes against the parts that read them: never a crash, never a wrong answer, always an end."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pierhead.config import GatewaySettings
from pierhead.gateway.admission import Door, Doorkeeper
from pierhead.gateway.ask import read_ask
from pierhead.gateway.faults import Fault, from_engine
from pierhead.gateway.link import Route, Snapshot
from pierhead.gateway.local import Locals
from pierhead.gateway.protocol import ClientConnection
from pierhead.gateway.scrape import relabel
from pierhead.gateway.services import Services
from pierhead.gateway.skeleton import Skeleton
from pierhead.gateway.sse import EventSplitter
from pierhead.gateway.usage import tokens
from pierhead.gateway.wire import BadMessage, ChunkedDecoder, parse_request, parse_response

FRAGMENTS = [
    b"GET /v1/models HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\n", b"Host: localhost\r\n", b"\r\n", b"\r", b"\n",
    b"Content-Length: 13\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n",
    b"Connection: close\r\n", b'{"model":"m"}', b"0\r\n\r\n", b"d\r\n", b"5\r\nhello\r\n", b"Upgrade: h2c\r\n", b" ",
    b"HEAD / HTTP/1.0\r\n", b"\0", b"\xff", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b";", b":",
]  # fmt: skip
pieces = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=40)), max_size=25)


class Transport(asyncio.Transport):
    """Keeps what is written; ends when told."""

    def __init__(self) -> None:
        super().__init__()
        self.out = b""
        self.ended = False

    def write(self, data):
        assert not self.ended, "written after the end"
        self.out += data

    def write_eof(self):
        self.ended = True

    def close(self):
        self.ended = True

    abort = close

    def is_closing(self):
        return self.ended

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def get_write_buffer_size(self):
        return 0

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


async def _no_engine(model: str, failed: str):
    raise Fault(503, "daemon_unavailable", "nobody")


def _services() -> Services:
    config = GatewaySettings(max_header=2048, max_url=256, max_body=4096)
    services = Services(config, Doorkeeper(config), _no_engine, lambda: None, lambda: None)
    services.apply(Snapshot(version=1, routes=(Route(name="m"),)))
    return services


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pieces, st.booleans())
def test_any_bytes_from_a_client_are_answered_or_closed(parts, finish):
    async def play() -> None:
        services = _services()
        connection = ClientConnection(services, Locals(services), Door("unix", False, False))
        transport = Transport()
        connection.connection_made(transport)
        for part in parts:
            if transport.ended:
                break
            if part:
                connection.data_received(part)
        for _ in range(20):
            await asyncio.sleep(0)
        if finish and not transport.ended:
            connection.eof_received()
            for _ in range(20):
                await asyncio.sleep(0)
        for age in (20, 100, 200, 400):
            if not transport.ended:
                connection.sweep(services.now + age)
        assert transport.ended
        assert not transport.out or transport.out.startswith(b"HTTP/1.1 ")
        connection.connection_lost(None)
        assert services.buffered == 0
        assert not services.connections

    asyncio.run(play())


@given(pieces)
def test_any_head_is_parsed_or_refused(parts):
    for parse in (parse_request, parse_response):
        try:
            head = parse(b"".join(parts) + b"\r\n\r\n")
        except BadMessage:
            continue
        assert not (head.chunked and head.length is not None)


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=10), st.binary(max_size=30), st.data())
def test_chunks_cut_anywhere_decode_to_what_was_sent(bodies, rest, data):
    raw = b"".join(b"%x\r\n%b\r\n" % (len(b), b) for b in bodies) + b"0\r\nA: b\r\n\r\n" + rest
    decoder = ChunkedDecoder()
    got = b""
    while raw:
        cut = data.draw(st.integers(1, len(raw)))
        got += b"".join(decoder.feed(raw[:cut]))
        raw = raw[cut:]
        if decoder.done:
            assert decoder.rest + raw == rest
            break
    assert decoder.done
    assert got == b"".join(bodies)


texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30) | st.just('\\"' * 3000) | st.just("é" * 9000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), texts, max_size=5), st.integers(1, 5000), st.booleans())
def test_the_reduced_document_names_the_same_model(document, step, ascii_only):
    raw = json.dumps({"x": document, "model": 'a"\\b', "y": document}, ensure_ascii=ascii_only).encode()
    skeleton = Skeleton()
    for start in range(0, len(raw), step):
        skeleton.feed(raw[start : start + step])
    assert read_ask(skeleton.result()).model == read_ask(raw).model == 'a"\\b'


@given(st.binary(max_size=300), st.integers(100, 599))
def test_any_engine_error_fits_the_envelope(raw, status):
    assert json.loads(from_engine(status, raw).body())["error"]["source"] == "engine"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ({"type": "BadRequestError", "code": 400, "message": "no"}, "invalid_request_error", "no"),
        ({"type": "Internal Server Error", "code": 500, "message": "no"}, "server_error", "no"),
        ({"type": "rate_limit_error", "message": "slow"}, "rate_limit_error", "slow"),
        (
            {
                "type": "Bad Request",
                "code": 400,
                "message": "1 validation error:\n  {'type': 'missing', 'loc': ('body', 'messages', 0, 'role'), "
                "'msg': 'Field required', 'input': {'model': 'm'}}",
            },
            "invalid_request_error",
            "messages.0.role: Field required",
        ),
    ],
)
def test_an_engines_error_has_a_type_of_openais_and_says_what_is_wrong_in_plain_words(error, kind, message):
    fault = from_engine(int(error.get("code", 429)), json.dumps({"error": error}).encode())
    assert (fault.type, fault.message) == (kind, message)


def test_a_message_and_its_hint_are_sentences():
    told = json.loads(Fault(507, "out_of_memory", "188 MiB are free", hint="Try less.").body("kserve"))
    assert told["error"] == "188 MiB are free. Try less."


@given(st.lists(st.sampled_from([b"data: x\n\n", b"data: ", b"y", b"\n", b"\r\n", b"data: [DONE]\n\n"]), max_size=20))
def test_the_event_splitter_loses_nothing_and_delivers_whole_events(parts):
    splitter = EventSplitter()
    out = b""
    for part in parts:
        events = splitter.feed(part)
        assert not events or events.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
        out += events
    assert out + splitter.flush() == b"".join(parts)


@given(st.binary(max_size=300))
def test_readers_of_engine_output_never_fail(raw):
    assert min(tokens(b'"usage":{' + raw)) >= 0
    for _, line in relabel(raw.decode("utf-8", "replace"), "m", "r"):
        assert "\n" not in line
