"""The load generator against scripted servers: what it sends, how it times, and that no server ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pierhead.errors import DaemonUnavailable, EngineFailed, NotFound, UsageError
from pierhead.loadtest.answer import Answer
from pierhead.loadtest.client import Pool, Target
from pierhead.loadtest.drive import pause
from pierhead.loadtest.figures import errors, figures, reasons
from pierhead.loadtest.plan import Load, Plan
from pierhead.loadtest.prompts import Prompt, Shape
from pierhead.loadtest.report import rows
from pierhead.loadtest.session import Trial, run

from .conftest import Bench, Request


async def quick(request: Request) -> None:
    request.answer()


async def test_a_closed_loop_keeps_so_many_requests_under_way(bench: Bench) -> None:
    async def slow(request: Request) -> None:
        await asyncio.sleep(0.01)
        request.answer()

    outcome, server = await bench(slow, Load(concurrency=5), requests=30)
    assert server.most == 5
    assert server.connections == 5, "connections are kept"
    assert len(outcome.passes[0].answers) == 30
    assert {a.error for a in outcome.passes[0].answers} == {""}


async def test_prompts_have_the_length_asked_for_and_no_two_are_alike(bench: Bench) -> None:
    outcome, server = await bench(quick, shape=Shape(50, 3))
    asked = [r.body for r in server.requests[2:]]
    assert outcome.scale.fixed == 2
    assert {a.prompt_tokens for a in outcome.passes[0].answers} == {50}
    assert len({b["messages"][0]["content"][:20] for b in asked}) == len(asked)
    assert {(b["max_tokens"], b["stream"], b["ignore_eos"]) for b in asked} == {(3, True, True)}


async def test_own_prompts_are_sent_as_they_are(bench: Bench) -> None:
    own = (Prompt("How old is it?"), Prompt(messages=({"role": "user", "content": "And this?"},), output_tokens=7))
    _, server = await bench(quick, shape=Shape(0, 5, own, ignore_eos=False))
    assert {(b.body["messages"][0]["content"], b.body["max_tokens"]) for b in server.requests} == {
        ("How old is it?", 5),
        ("And this?", 7),
    }
    assert not any("ignore_eos" in r.body for r in server.requests)


async def test_an_open_loop_sends_whether_or_not_answers_came(bench: Bench) -> None:
    async def held(request: Request) -> None:
        if len(request.body["messages"][0]["content"].split()) not in (16, 144):
            await asyncio.sleep(0.3)
        request.answer()

    outcome, server = await bench(held, Load(rate=200), requests=40)
    assert server.most > 20
    assert not errors(outcome.passes[0].answers)


async def test_waiting_that_a_server_caused_counts_from_the_arrival(bench: Bench) -> None:
    """No coordinated omission: a server that stops for a while delays all that arrived meanwhile."""
    stop = asyncio.Event()
    began: list[float] = []

    async def stalls(request: Request) -> None:
        words = len(request.body["messages"][0]["content"].split())
        if words not in (16, 144):
            began.append(time.perf_counter())
            if len(began) == 1:
                asyncio.get_running_loop().call_later(0.8, stop.set)
            await stop.wait()
        request.answer()

    outcome, _ = await bench(stalls, Load(rate=100), requests=100, most=1)
    found = figures(outcome.passes)
    assert found["ttft_p99_ms"] > 600
    assert found["ttft_p50_ms"] > 100, "most of all arrivals came while it stood still"


async def test_embeddings_are_timed_whole(bench: Bench) -> None:
    async def embed(request: Request) -> None:
        if request.path == "/v1/models":
            return request.json({"data": [{"id": "m", "capabilities": ["embeddings"]}]})
        words = len(request.body["input"].split())
        request.json({"data": [{"embedding": [0.1]}], "usage": {"prompt_tokens": words + 2, "total_tokens": words + 2}})

    outcome, server = await bench(embed, task="")
    assert outcome.task == "embeddings"
    assert server.requests[-1].path == "/v1/embeddings"
    found = figures(outcome.passes)
    assert found["e2e_p50_ms"] > 0
    assert found["total_tps"] == pytest.approx(20 * found["rps"], rel=0.01)
    assert "ttft_p50_ms" not in found


async def test_what_a_model_cannot_is_said(bench: Bench) -> None:
    async def card(request: Request) -> None:
        request.json({"data": [{"id": "m", "capabilities": ["images"]}]})

    with pytest.raises(UsageError, match="it can images"):
        await bench(card, task="")


def test_a_client_waits_a_second_at_most_however_often_its_server_failed() -> None:
    assert [pause(n) for n in (0, 1, 2, 5, 10_000)] == [0, 0.1, 0.2, 1, 1]


async def test_failures_are_counted_by_kind_with_the_servers_words(bench: Bench) -> None:
    turn = iter(range(1000))

    async def mixed(request: Request) -> None:
        match next(turn) - 2:
            case 0:
                request.json({"error": {"message": "too many at once"}}, 429)
            case 1:
                request.json({"error": "it broke"}, 500)
            case 2:
                request.stream()
                request.token()
                request.event({"error": {"message": "out of memory"}})
                request.raw(b"0\r\n\r\n")
            case 3:
                request.stream()
                request.token()
                request.writer.transport.abort()
            case 4:
                request.raw(b"HTTP/1.1 banana\r\n\r\n")
            case 5:
                request.stream()
                request.event(b"{no json")
            case 6:
                await asyncio.sleep(10)
            case 7:
                request.stream()
                request.end()
            case _:
                request.answer()

    outcome, _ = await bench(mixed, Load(concurrency=1), requests=12, timeout=1.0)
    answers = outcome.passes[0].answers
    assert errors(answers) == {
        "http_429": 1,
        "http_500": 1,
        "stream_error": 1,
        "broken_off": 1,
        "not_understood": 2,
        "timeout": 1,
    }
    assert reasons(answers)["http_429"] == "too many at once"
    assert reasons(answers)["http_500"] == "it broke"
    assert reasons(answers)["stream_error"] == "out of memory"
    row = rows(outcome.passes)[0]
    assert row.failed == 7
    assert row.figures["failed_share"] == pytest.approx(7 / 12, abs=0.001)


async def test_an_idle_connection_that_the_server_closed_is_no_failure(bench: Bench) -> None:
    async def once(request: Request) -> None:
        request.answer()
        await request.writer.drain()
        request.writer.close()

    outcome, server = await bench(once, Load(concurrency=1))
    assert not errors(outcome.passes[0].answers)
    assert server.connections >= 12


async def test_an_answer_that_ends_with_its_connection_is_whole_where_it_has_no_length(bench: Bench) -> None:
    async def old(request: Request) -> None:
        body = b'{"data": [], "usage": {"prompt_tokens": 20, "total_tokens": 20}}'
        request.raw(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + body)
        await request.writer.drain()
        request.writer.close()

    outcome, _ = await bench(old, task="embeddings")
    assert not errors(outcome.passes[0].answers)
    assert {a.prompt_tokens for a in outcome.passes[0].answers} == {20}


async def test_a_server_that_goes_away_for_good_is_failures_not_an_end(bench: Bench) -> None:
    turn = iter(range(1000))

    async def dies(request: Request) -> None:
        if next(turn) < 4:
            return request.answer()
        request.writer.transport.abort()

    outcome, _ = await bench(dies, Load(concurrency=2), requests=8)
    assert errors(outcome.passes[0].answers) == {"broken_off": 6}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, UsageError), (404, NotFound), (400, UsageError), (503, EngineFailed)],
)
async def test_a_test_that_can_measure_nothing_says_why(bench: Bench, status: int, kind: type[Exception]) -> None:
    async def refuses(request: Request) -> None:
        request.json({"error": {"message": "not like this"}}, status)

    with pytest.raises(kind, match="not like this"):
        await bench(refuses)


async def test_a_server_that_is_not_there_is_said() -> None:
    trial = Trial(Target(socket="/nowhere/at.sock"), "m", Plan((Load(concurrency=1),)), Shape())
    with pytest.raises(DaemonUnavailable, match="does not answer"):
        await run(trial, lambda seen: None, lambda text: None)


async def test_a_server_that_counts_no_tokens_is_measured_by_pieces(bench: Bench) -> None:
    async def bare(request: Request) -> None:
        request.stream()
        for _ in range(4):
            request.token()
        request.end()

    outcome, _ = await bench(bare)
    assert {a.output_tokens for a in outcome.passes[0].answers} == {4}
    assert not outcome.scale.known


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=80), max_size=6), st.booleans())
def test_no_bytes_break_an_answer(pieces: list[bytes], sse: bool) -> None:
    answer = Answer(True, 0.0)
    answer.head(200, b"text/event-stream" if sse else b"application/json")
    for piece in pieces:
        answer.piece(b"data: " + piece, 1.0)
    answer.end(2.0)
    assert isinstance(answer.error, str)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 64, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", b"GET / HTTP/1.1\r\n\r\n"]
)
async def test_no_reply_breaks_the_client(serve: Callable[..., Awaitable[tuple[Any, Target]]], data: bytes) -> None:
    async def reply(request: Request) -> None:
        request.raw(data)
        await request.writer.drain()
        request.writer.close()

    _, target = await serve(reply)
    answer = Answer(True, time.perf_counter())
    async with asyncio.timeout(10):
        await Pool(target).ask(target.request("POST", "/x", b"{}"), answer, 2.0)
    assert answer.error in ("broken_off", "not_understood")


async def test_the_generator_is_no_bottleneck(bench: Bench) -> None:
    """Generator and scripted server share this process; both together do more than engines of this kind answer."""
    outcome, _ = await bench(quick, Load(concurrency=16), requests=1500)
    measured = outcome.passes[0]
    assert len(measured.answers) / measured.seconds > 300
