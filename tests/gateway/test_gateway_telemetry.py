"""The process beside the gateway: access log, traces, metrics and recordings; none of them ever delays an answer."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pierhead.gateway import journal_lines as journal
from pierhead.gateway import link
from pierhead.gateway.telemetry.logfile import KEPT, LogFile
from pierhead.gateway.telemetry.messages import Batch, Frames, frame
from pierhead.gateway.telemetry.records import Record, Records, Wanted
from pierhead.gateway.trace import Tracer, onward, parse

WORDS = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def answer(call) -> None:
    """An engine that streams when asked to, fails for "boom", and says a mail address."""
    if b"boom" in call.body:
        await call.json({"error": {"message": "it broke"}}, 500)
    elif b'"stream":true' in call.body.replace(b" ", b""):
        await call.sse()
        for word in ("mail ", "jo", "@exam", "ple.com"):
            await call.event({"choices": [{"index": 0, "delta": {"content": word}}]})
        await call.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await call.event({"usage": WORDS, "choices": []})
        await call.event(b"[DONE]")
        await call.end()
    else:
        message = {"role": "assistant", "content": "write to jo@example.com"}
        await call.json({"choices": [{"index": 0, "finish_reason": "length", "message": message}], "usage": WORDS})


@pytest.fixture
async def start(new_gate, new_engine, folder) -> Callable[..., Any]:
    """A gateway with these settings before that engine."""

    async def begin(**settings: Any):
        engine = await new_engine(answer)
        gate = await new_gate(extra={"state": str(folder)}, **settings)
        endpoint = msgspec.structs.replace(engine.endpoint, revision="4fe1c02a99d0")
        await gate.serve(link.Route(name="m", endpoints=(endpoint,)))
        return gate, engine

    return begin


# --- the access log ---------------------------------------------------------------------------------------------------


async def test_a_line_tells_everything_about_a_request_but_what_was_said(start, folder, chat):
    gate, _ = await start(access_log=str(folder / "logs" / "access.log"))
    secret = {"messages": [{"role": "user", "content": "my secret plan"}]}
    await gate.ask("POST", "/v1/chat/completions", chat | secret, headers={"x-request-id": "one"})
    await gate.ask("POST", "/v1/chat/completions", chat | {"stream": True}, headers={"x-request-id": "two"})
    await gate.ask("POST", "/v1/chat/completions", chat | {"user": "boom"}, headers={"x-request-id": "three"})
    await gate.ask("GET", "/v1/nothing", headers={"x-request-id": "four", "authorization": "Bearer pier_secret"})
    await gate.stop()
    text = (folder / "logs" / "access.log").read_text()
    assert (folder / "logs" / "access.log").stat().st_mode & 0o777 == 0o600
    lines = {line["id"]: line for line in map(json.loads, text.splitlines())}
    assert sum("marker" not in line for line in text.splitlines()) == 4, "one each"
    one, two, three, four = (lines[name] for name in ("one", "two", "three", "four"))
    assert (one["status"], one["model"], one["operation"], one["replica"]) == (200, "m", "chat", "e0")
    assert one["revision"] == "4fe1c02a99d0"
    assert {
        line.revision for path, _ in journal.files(folder / "usage") for line in journal.lines(path.read_bytes())[0]
    } == {"4fe1c02a99d0"}
    assert (one["prompt_tokens"], one["cached_tokens"], one["completion_tokens"]) == (12, 5, 3)
    assert (one["finish"], one["stream"], one["queued"]) == ("length", False, 0.0)
    assert two["ttft"] > 0
    assert (two["finish"], two["stream"]) == ("stop", True)
    assert (three["ok"], three["code"]) == (False, "engine_error")
    assert (four["status"], four["path"]) == (404, "/v1/nothing")
    assert all("time" in line for line in lines.values())
    assert "secret" not in text


def test_a_log_is_rotated_by_size_and_goes_on_when_it_was_moved_away(tmp_path):
    path = tmp_path / "access.log"
    log = LogFile(str(path), 1000)
    for number in range(100):
        assert log.write([b"%06d %s\n" % (number, b"x" * 92)]) == 0
    files = sorted(tmp_path.iterdir())
    assert len(files) == KEPT + 1
    assert all(file.stat().st_size <= 1000 for file in files)
    newest = path.read_bytes().splitlines()[-1]
    assert newest.startswith(b"000099")
    path.rename(tmp_path / "taken")
    log.write([b"next\n"])
    assert path.read_bytes() == b"next\n"


async def test_when_the_process_beside_it_is_killed_another_takes_its_place(start, folder, chat):
    gate, _ = await start(access_log=str(folder / "access.log"))
    (child,) = psutil.Process(gate.pid).children()
    os.kill(child.pid, signal.SIGKILL)
    path = folder / "access.log"
    async with asyncio.timeout(15):
        while not (path.exists() and b"again" in path.read_bytes()):
            assert (
                await gate.ask("POST", "/v1/chat/completions", chat, headers={"x-request-id": "again"})
            ).status == 200
            await asyncio.sleep(0.05)
    metrics = (await gate.ask("GET", "/metrics")).body.decode()
    dropped = next(line for line in metrics.splitlines() if line.startswith("pierhead_telemetry_dropped_total"))
    assert int(dropped.split()[1]) > 0


async def test_the_process_beside_it_ends_with_the_gateway(start, folder):
    gate, _ = await start(access_log=str(folder / "access.log"))
    (child,) = psutil.Process(gate.pid).children()
    os.kill(gate.pid, signal.SIGKILL)
    gone, alive = await asyncio.to_thread(psutil.wait_procs, [child], 10)
    assert gone
    assert not alive


def test_frames_come_whole_however_they_are_cut():
    data = b"".join(frame(Batch(local=[{"n": n}])) for n in range(5))
    for size in (1, 3, 1000):
        frames = Frames()
        found = [m for i in range(0, len(data), size) for m in frames.feed(data[i : i + size])]
        assert [m.local[0]["n"] for m in found] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="too long"):
        Frames().feed(b"\xff\xff\xff\xff")


# --- OpenTelemetry ----------------------------------------------------------------------------------------------------


class Receiver:
    """An OTLP receiver over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.metrics: dict[str, Any] = {}
        self.got = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                receiver.take(self.path, body)
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait(self, spans: int) -> None:
        """Until it was sent so many."""
        while len(self.spans) < spans:
            self.got.clear()
            assert len(self.spans) >= spans or self.got.wait(60), f"{len(self.spans)} spans came"

    def take(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            request = ExportTraceServiceRequest.FromString(body)
            self.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
            self.resource = {a.key: a.value.string_value for a in request.resource_spans[0].resource.attributes}
        elif path == "/v1/metrics":
            sent = ExportMetricsServiceRequest.FromString(body)
            self.metrics |= {
                m.name: m for r in sent.resource_metrics for scope in r.scope_metrics for m in scope.metrics
            }
        self.got.set()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    found = {}
    for item in span.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


async def test_spans_and_metrics_follow_the_genai_conventions(start, receiver, chat):
    gate, engine = await start(otel_endpoint=receiver.url)
    ids = {"traceparent": TRACE, "tracestate": "vendor=1"}
    await gate.ask("POST", "/v1/chat/completions", chat | {"stream": True, "n": 2}, headers=ids)
    await gate.ask("POST", "/v1/chat/completions", chat | {"user": "boom"})
    await asyncio.to_thread(receiver.wait, 4)  # on a busy machine the SDK is imported for longer than an end may take
    await gate.stop()
    first, second = engine.calls[0].headers, engine.calls[1].headers
    assert first["tracestate"] == "vendor=1"
    version, trace, parent, flags = first["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE[3:35], "01")
    assert parent != TRACE[36:52]
    assert parse(second["traceparent"]) is not None
    spans = {(s.trace_id.hex() == TRACE[3:35], s.name): s for s in receiver.spans}
    server, call = spans[True, "POST /v1/chat/completions"], spans[True, "chat m"]
    assert server.parent_span_id.hex() == TRACE[36:52]
    assert (call.span_id.hex(), call.parent_span_id) == (parent, server.span_id)
    assert (server.kind, call.kind) == (2, 3)  # SERVER, CLIENT
    assert server.start_time_unix_nano <= call.start_time_unix_nano < call.end_time_unix_nano
    found = attributes(call)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.provider.name"] == "pierhead"
    assert (found["gen_ai.request.model"], found["gen_ai.response.model"]) == ("m", "m")
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (12, 3)
    assert found["gen_ai.usage.cache_read.input_tokens"] == 5
    assert found["gen_ai.response.finish_reasons"] == ["stop"]
    assert found["gen_ai.request.choice.count"] == 2
    assert attributes(server)["http.response.status_code"] == 200
    failed = spans[False, "chat m"]
    assert failed.status.code == 2
    assert attributes(failed)["error.type"] == "engine_error"
    assert failed.parent_span_id != b""
    assert receiver.resource["service.name"] == "pierhead"
    assert "example.com" not in str(receiver.spans)
    tokens = receiver.metrics["gen_ai.client.token.usage"]
    assert tokens.unit == "{token}"
    assert list(tokens.histogram.data_points[0].explicit_bounds) == [float(4**n) for n in range(14)]
    assert {attributes(p)["gen_ai.token.type"]: p.sum for p in tokens.histogram.data_points} == {
        "input": 12,
        "output": 3,
    }
    for name in ("gen_ai.server.request.duration", "gen_ai.client.operation.duration"):
        assert sum(p.count for p in receiver.metrics[name].histogram.data_points) == 2
    assert receiver.metrics["gen_ai.server.time_to_first_token"].histogram.data_points[0].count == 1
    assert receiver.metrics["gen_ai.server.time_per_output_token"].histogram.data_points[0].count == 1


async def test_a_receiver_that_does_not_answer_delays_nobody(start, chat):
    server = await asyncio.start_server(lambda r, w: asyncio.sleep(60), "127.0.0.1", 0)
    async with server:
        gate, _ = await start(otel_endpoint=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with asyncio.timeout(10):
            for _ in range(200):
                assert (await gate.ask("POST", "/v1/chat/completions", chat)).status == 200
        for child in psutil.Process(gate.pid).children():
            child.kill()
        server.close_clients() if hasattr(server, "close_clients") else None


async def test_without_tracing_a_clients_trace_reaches_the_engine_as_it_is(start, chat):
    gate, engine = await start()
    await gate.ask("POST", "/v1/chat/completions", chat, headers={"traceparent": TRACE})
    assert engine.calls[0].headers["traceparent"] == TRACE


@pytest.mark.parametrize(
    "header",
    [
        "",
        "x",
        TRACE.upper(),
        TRACE + "-more",
        "ff" + TRACE[2:],
        "00-" + "0" * 32 + TRACE[35:],
        TRACE[:36] + "0" * 16 + "-01",
    ],
)
def test_a_trace_that_is_none_begins_anew(header):
    context, span = Tracer(1.0).begin(header)
    made = parse(context)
    assert made is not None
    assert (made.sampled, made.remote) == (True, False)
    assert onward(context, span) == f"traceparent: 00-{made.trace}-{span}-01\r\n".encode()


def test_only_a_share_of_new_traces_is_kept_and_a_clients_choice_holds():
    tracer = Tracer(0.25)
    kept = sum(parse(tracer.begin("")[0]).sampled for _ in range(4000))
    assert 800 < kept < 1200
    assert not parse(tracer.begin(TRACE[:-1] + "0")[0]).sampled
    assert parse(tracer.begin(TRACE)[0]).sampled


# --- recordings -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def stopped(gate: Any) -> AsyncIterator[None]:
    await gate.stop()
    yield


def by_id(folder: Path) -> dict[str, Record]:
    return {r.id: r for r in Records(folder / "records").find(Wanted(), 1000)}


async def test_requests_are_recorded_with_what_is_private_taken_out(start, folder, chat):
    gate, _ = await start(record="all", record_redact=(r"apollo-\d+",))
    body = chat | {"messages": [{"role": "user", "content": "apollo-11: I am jo@example.com, sk-abcdef0123456789"}]}
    secret = {"authorization": "Bearer pier_verysecret123", "x-request-id": "one", "cookie": "a=b"}
    await gate.ask("POST", "/v1/chat/completions", body, headers=secret)
    await gate.ask("POST", "/v1/chat/completions", chat | {"stream": True}, headers={"x-request-id": "two"})
    await gate.ask("POST", "/v1/chat/completions", chat | {"user": "boom"}, headers={"x-request-id": "three"})
    await gate.stop()
    found = by_id(folder)
    one, two, three = found["one"], found["two"], found["three"]
    assert one.request["messages"][0]["content"] == "[redacted]: I am [e-mail], [key]"
    assert one.answer["choices"][0]["message"]["content"] == "write to [e-mail]"
    assert (one.text, one.status, one.prompt_tokens, one.path) == (
        "write to [e-mail]", 200, 12, "/v1/chat/completions",
    )  # fmt: skip
    assert (two.text, two.stream, two.answer) == ("mail [e-mail]", True, None)
    assert (three.ok, three.code) == (False, "engine_error")
    assert three.answer["error"]["message"].startswith("it broke")
    raw = b"".join(file.read_bytes() for file in (folder / "records").iterdir())
    for word in (b"example.com", b"verysecret", b"abcdef0123456789", b"apollo-11", b"cookie"):
        assert word not in raw
    assert (folder / "records").stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in (folder / "records").iterdir())


async def test_only_errors_are_recorded_when_so_asked_and_some_keys_never(start, folder, chat, new_gate):
    gate, _ = await start(record="errors")
    await gate.ask("POST", "/v1/chat/completions", chat, headers={"x-request-id": "fine"})
    await gate.ask("POST", "/v1/chat/completions", chat | {"user": "boom"}, headers={"x-request-id": "bad"})
    await gate.stop()
    assert set(by_id(folder)) == {"bad"}


async def test_long_bodies_are_cut_and_the_whole_has_a_bound(start, folder, chat):
    gate, _ = await start(record="all", record_max_bytes=10_000, record_keep_bytes=60_000)
    words = " ".join(["word"] * 1500)
    for number in range(20):
        body = chat | {"messages": [{"role": "user", "content": words}]}
        await gate.ask("POST", "/v1/chat/completions", body, headers={"x-request-id": f"r{number}"})
    long = chat | {"messages": [{"role": "user", "content": words * 100}]}
    await gate.ask("POST", "/v1/chat/completions", long, headers={"x-request-id": "long"})
    await gate.stop()
    found = by_id(folder)
    assert found["long"].cut
    assert not found["r19"].cut
    assert "r0" not in found
    assert 3 < len(found) < 10


async def test_some_keys_are_never_recorded(start, folder, chat):
    gate, engine = await start(record="all", record_except=("payroll", "key_c"), require_key=True)
    pepper = b"p" * 32
    keys = tuple(
        link.Key(f"key_{i}", hmac.digest(pepper, f"text-{i}".encode(), "sha256").hex(), name=name)
        for i, name in (("a", "laptop"), ("b", "payroll"), ("c", "other"))
    )
    route = link.Route(name="m", endpoints=(engine.endpoint,))
    await gate.serve(route, keys=keys, pepper=pepper.hex())
    for name in ("a", "b", "c"):
        headers = {"authorization": f"Bearer text-{name}", "x-request-id": f"by-{name}"}
        assert (await gate.ask("POST", "/v1/chat/completions", chat, headers=headers)).status == 200
    await gate.stop()
    assert set(by_id(folder)) == {"by-a"}
    assert by_id(folder)["by-a"].key == "key_a"
