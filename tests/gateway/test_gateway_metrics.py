"""What /metrics says: the gateway's own counters and every engine's, labelled so that nothing collides."""

from __future__ import annotations

from pierhead.gateway import link
from pierhead.gateway.metrics import Metrics
from pierhead.gateway.scrape import relabel

ENGINE = b"""# HELP llamacpp:tokens_total Tokens.
# TYPE llamacpp:tokens_total counter
llamacpp:tokens_total 32
llamacpp:by{model="x",kind="a b"} 1.5
pierhead_fake{a="b"} 1
broken{a="b} 1
alsobroken 1 } 2
"""


async def test_the_gateways_and_the_engines_metrics_come_labelled(gate, new_engine, chat):
    async def answer(call):
        if b"GET /metrics" in call.head:
            await call.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(ENGINE) + ENGINE
            )
            return
        await call.sse()
        for _ in range(3):
            await call.event({})
        await call.event(b"[DONE]")
        await call.end()

    async def mute(call):
        await call.reader.read()

    engine, silent = await new_engine(answer), await new_engine(mute)
    odd = link.Route(name='q"\\\n', endpoints=(silent.endpoint,))
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)), odd)
    await gate.ask("POST", "/v1/chat/completions", chat)
    got = await gate.ask("GET", "/metrics")
    text = got.body.decode()
    lines = text.splitlines()
    assert got.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'pierhead_requests_total{model="m",code="200"} 1' in lines
    assert 'pierhead_time_to_first_token_seconds_count{model="m"} 1' in lines
    assert 'pierhead_inter_token_seconds_bucket{model="m",le="+Inf"}' in text
    assert 'llamacpp:tokens_total{model="m",replica="e0"} 32' in lines
    assert 'llamacpp:by{model="m",replica="e0",engine_model="x",kind="a b"} 1.5' in lines
    assert 'pierhead_replica_up{model="m",replica="e0"} 1' in lines
    assert 'pierhead_replica_up{model="q\\"\\\\\\n",replica="e1"} 0' in lines
    assert "pierhead_fake" not in text
    assert "broken" not in text


async def test_an_engine_that_answers_without_end_costs_bounded_memory(gate, new_engine):
    async def answer(call):
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            await call.send(b"a 1\n" * 100_000)

    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    got = await gate.ask("GET", "/metrics")
    assert 'pierhead_replica_up{model="m",replica="e0"} 0' in got.body.decode()


def test_relabelling_escapes_and_drops_what_is_no_sample():
    lines = list(relabel('x 1\nx{a="b"} NaN 123\nx{a="\n"} 1\nx 1 2 3\n# EOF\n{} 1\n', 'm"', "r"))
    assert lines == [("x", 'x{model="m\\"",replica="r"} 1'), ("x", 'x{model="m\\"",replica="r",a="b"} NaN')]


def test_models_that_are_gone_are_forgotten_once_they_are_many():
    metrics = Metrics()
    for number in range(1500):
        metrics.model(f"m{number}").finished(200, 0.1)
        metrics.keep([f"m{number}", "m0"])
    assert len(metrics.models) <= 1001
    assert "m0" in metrics.models
    assert "m1499" in metrics.models
