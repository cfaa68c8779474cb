"""Counters per key, model and operation, and the field's GenAI histograms: right, bounded and well-formed."""

from __future__ import annotations

import hashlib
import hmac
import math

from prometheus_client.parser import text_string_to_metric_families

from pierhead.gateway import link
from pierhead.gateway.outcome import Outcome
from pierhead.gateway.tally import Tally
from pierhead.gateway.usage import Usage

KEY = "pier_test_key_0123456789"
PEPPER = b"p" * 32
WORDS = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}


def outcome(**more) -> Outcome:
    given = {
        "id": "r", "time": 1e9, "key": "key_a", "operation": "chat", "dialect": "openai", "asked": "m", "model": "m",
        "replica": "r", "status": 200, "ok": True, "stream": False, "usage": Usage(12, 3, 5, True), "seconds": 0.5,
    }  # fmt: skip
    return Outcome(**(given | more))


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample; the parser refuses what is no exposition text, and a family must come once."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(found, name: str, **labels: str) -> float:
    return sum(v for (n, have), v in found.items() if n == name and labels.items() <= dict(have).items())


async def test_what_a_key_used_of_a_model_is_counted(gate, new_engine, chat):
    async def answer(call):
        if b"GET /metrics" in call.head:
            await call.json({})
        elif b"stream" in call.body:
            await call.sse()
            for _ in range(3):
                await call.event({"choices": [{"delta": {"content": "x"}}]})
            await call.event({"usage": WORDS, "choices": []})
            await call.event(b"[DONE]")
            await call.end()
        elif b"boom" in call.body:
            await call.json({"error": {"message": "no", "code": 'evil"} 1\n'}}, 500)
        else:
            await call.json({"choices": [], "usage": WORDS})

    engine = await new_engine(answer)
    mac = hmac.digest(PEPPER, KEY.encode(), hashlib.sha256).hex()
    keys = (link.Key("key_a", mac),)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)), keys=keys, pepper=PEPPER.hex())
    gate.snapshot_extra = {"keys": keys, "pepper": PEPPER.hex()}
    headers = {"authorization": f"Bearer {KEY}"}
    for _ in range(2):
        assert (await gate.ask("POST", "/v1/chat/completions", chat, unix=True)).status == 200
    assert (await gate.ask("POST", "/v1/chat/completions", chat | {"stream": True}, unix=True)).status == 200
    assert (await gate.ask("POST", "/v1/chat/completions", chat | {"user": "boom"}, headers=headers)).status >= 500
    got = await gate.ask("GET", "/metrics")
    found = samples(got.body.decode())
    assert value(found, "pierhead_key_requests_total", model="m", operation="chat", code="200") == 3
    assert value(found, "pierhead_key_prompt_tokens_total", model="m") == 36
    assert value(found, "pierhead_key_cached_tokens_total", model="m") == 15
    assert value(found, "pierhead_key_completion_tokens_total", model="m") == 9
    assert value(found, "pierhead_prefix_cache_hits_total", model="m") == 3
    assert value(found, "pierhead_errors_total", model="m") == 1
    assert value(found, "pierhead_key_time_to_first_token_seconds_count") == 1
    chats = {"gen_ai_operation_name": "chat", "gen_ai_request_model": "m", "gen_ai_provider_name": "pierhead"}
    assert value(found, "gen_ai_server_request_duration_seconds_count", **chats) == 4
    assert value(found, "gen_ai_server_time_to_first_token_seconds_count", **chats) == 1
    assert value(found, "gen_ai_server_time_per_output_token_seconds_count", **chats) == 1
    assert value(found, "gen_ai_client_token_usage_sum", gen_ai_token_type="input", **chats) == 36
    assert value(found, "gen_ai_client_token_usage_bucket", gen_ai_token_type="output", le="4.0", **chats) == 3
    assert value(found, "pierhead_prompt_tokens_total", model="m") == 36  # the older names stay
    assert value(found, "pierhead_usage_lost_total") == 0


def test_more_keys_and_models_than_there_is_room_for_share_one_place():
    tally = Tally(most=10)
    for number in range(5000):
        tally.put(outcome(key=f"key_{number}", model=f"m{number % 50}"))
    found = samples("".join(tally.render()))
    keys = {dict(labels)["key"] for name, labels in found if name == "pierhead_key_requests_total"}
    assert len(keys) <= 11
    assert "other" in keys
    assert value(found, "pierhead_key_requests_total") == 5000
    assert len(found) < 3000


def test_errors_that_engines_name_are_kept_few_and_clean():
    tally = Tally()
    for number in range(1000):
        tally.put(outcome(status=400, code=f"code_{number}"))
    tally.put(outcome(status=502, code='x"}\n# EOF', ok=False))
    tally.put(outcome(status=200, ok=False))
    found = samples("".join(tally.render()))
    errors = {dict(labels)["error"] for name, labels in found if name == "pierhead_errors_total"}
    assert len(errors) <= 43
    assert value(found, "pierhead_errors_total") == 1002
    assert not any("EOF" in error for error in errors)


def test_buckets_are_those_of_the_conventions_and_add_up():
    tally = Tally()
    for seconds in (0.005, 0.015, 5.0, 1000.0):
        tally.put(outcome(seconds=seconds, model='q"\\\n'))
    found = samples("".join(tally.render()))
    buckets = {
        float(dict(labels)["le"]): count
        for (name, labels), count in found.items()
        if name == "gen_ai_server_request_duration_seconds_bucket"
    }
    bounds = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
    assert sorted(buckets) == [*bounds, math.inf]
    assert [buckets[b] for b in (0.01, 0.02, 2.56, 5.12, 81.92, math.inf)] == [1, 2, 2, 3, 3, 4]
