"""Anthropic's clients at the gateway's door: its errors, headers and models; the engine is scripted."""

from __future__ import annotations

import json

import pytest

from pierhead.gateway import link

ASK = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}


async def test_a_message_is_answered_by_a_chat_engine(gate, new_engine, talks) -> None:
    engine = await new_engine(talks)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    answer = await gate.ask("POST", "/v1/messages", ASK)
    assert answer.status == 200
    assert answer.json()["content"][0]["text"] == "Ahoy"
    assert answer.json()["usage"]["input_tokens"] == 5
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert engine.calls[-1].head.startswith(b"POST /v1/chat/completions ")


async def test_a_stream_of_a_message_ends_with_its_usage(gate, new_engine, talks) -> None:
    engine = await new_engine(talks)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    answer = await gate.ask("POST", "/v1/messages", ASK | {"stream": True})
    assert answer.headers["content-type"] == "text/event-stream"
    events = [json.loads(line[6:]) for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    assert "".join(e["delta"].get("text", "") for e in events if e["type"] == "content_block_delta") == "Ahoy there"
    assert events[-2]["usage"]["output_tokens"] == 2
    assert events[-1] == {"type": "message_stop"}


async def test_a_translated_request_is_asked_for_by_the_engines_own_name(gate, new_engine, talks) -> None:
    engine = await new_engine(talks)
    endpoint = link.Endpoint("r", str(engine.path), model="inner", serves=("chat",))
    await gate.serve(link.Route(name="m", endpoints=(endpoint,)))
    answer = await gate.ask("POST", "/v1/messages", ASK)
    assert answer.json()["model"] == "m"
    assert json.loads(engine.calls[-1].body)["model"] == "inner"


async def test_an_engine_that_breaks_in_the_middle_is_told_as_an_event(gate, new_engine, talks) -> None:
    async def break_off(call) -> None:
        await call.sse()
        await call.event({"choices": [{"index": 0, "delta": {"content": "Ahoy"}}]})
        call.reset()

    engine = await new_engine(break_off)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    answer = await gate.ask("POST", "/v1/messages", ASK | {"stream": True})
    name, data = answer.body.decode().split("\n\n")[-2].split("\n")
    assert name == "event: error"
    assert json.loads(data[6:])["error"]["type"] == "api_error"


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (ASK | {"model": "absent"}, 404, "not_found_error"),
        (ASK | {"max_tokens": None}, 400, "invalid_request_error"),
        (b"{", 400, "invalid_request_error"),
        (ASK | {"messages": [{"role": "user", "content": "x" * 3000}]}, 413, "request_too_large"),
    ],
)
async def test_faults_have_anthropics_shape(new_gate, new_engine, talks, body, status: int, kind: str) -> None:
    gate = await new_gate(max_body=2000)
    engine = await new_engine(talks)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        if status == 400 and path.endswith("tokens") and isinstance(body, dict):
            continue
        answer = await gate.ask("POST", path, body)
        said = answer.json()
        assert (answer.status, said["type"], said["error"]["type"]) == (status, "error", kind)
        assert said["request_id"] == answer.headers["request-id"]


async def test_an_engines_own_refusals_have_anthropics_shape_and_overload_is_529(gate, new_engine, talks) -> None:
    statuses = iter((429, 503, 500))

    async def refuse(call) -> None:
        await call.json({"error": {"message": "no", "type": "x"}}, next(statuses))

    engine = await new_engine(refuse)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    seen = []
    for _ in range(3):
        answer = await gate.ask("POST", "/v1/messages", ASK)
        seen.append((answer.status, answer.json()["error"]["type"]))
    assert seen == [(429, "rate_limit_error"), (529, "overloaded_error"), (500, "api_error")]


async def test_a_key_is_taken_from_x_api_key_and_its_lack_is_told_in_anthropics_shape(
    new_gate, new_engine, talks, lock
) -> None:
    gate = await new_gate(require_key=True)
    engine = await new_engine(talks)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)), **lock("sesame"))
    bare = await gate.ask("POST", "/v1/messages", ASK)
    assert (bare.status, bare.json()["error"]["type"]) == (401, "authentication_error")
    assert (await gate.ask("POST", "/v1/messages", ASK, headers={"x-api-key": "sesame"})).status == 200
    models = await gate.ask("GET", "/v1/models", headers={"anthropic-version": "2023-06-01"})
    assert (models.status, models.json()["type"]) == (401, "error")


async def test_the_models_have_anthropics_shape_for_its_clients_only(gate) -> None:
    names = [f"m{n}" for n in range(5)]
    await gate.serve(*(link.Route(name=name, card={"created": 1700000000}) for name in names))
    theirs = {"anthropic-version": "2023-06-01"}
    assert (await gate.ask("GET", "/v1/models")).json()["object"] == "list"
    page = (await gate.ask("GET", "/v1/models?limit=2", headers=theirs)).json()
    assert [m["id"] for m in page["data"]] == ["m0", "m1"]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, "m0", "m1")
    assert page["data"][0]["created_at"] == "2023-11-14T22:13:20Z"
    page = (await gate.ask("GET", "/v1/models?limit=9&after_id=m1", headers=theirs)).json()
    assert [m["id"] for m in page["data"]][:3] == ["m2", "m3", "m4"]
    page = (await gate.ask("GET", "/v1/models?limit=2&before_id=m4", headers=theirs)).json()
    assert ([m["id"] for m in page["data"]], page["has_more"]) == (["m2", "m3"], True)
    assert (await gate.ask("GET", "/v1/models?limit=0", headers=theirs)).json()["error"]["message"].startswith("limit")
    one = (await gate.ask("GET", "/v1/models/m3", headers=theirs)).json()
    assert (one["type"], one["id"]) == ("model", "m3")
    gone = await gate.ask("GET", "/v1/models/absent", headers=theirs)
    assert (gone.status, gone.json()["error"]["type"]) == (404, "not_found_error")


async def test_a_whole_chat_answer_has_the_members_that_openai_never_leaves_out(gate, new_engine, talks) -> None:
    async def answer(call) -> None:
        said = {"role": "assistant", "content": 'He said "refusal": {"message":{"role":"assistant",'}
        choice = {"finish_reason": "stop", "index": 0, "message": said}
        text = json.dumps({"choices": [choice], "object": "chat.completion"}, separators=(",", ":")).encode()
        await call.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(text) + text
        )

    engine = await new_engine(answer)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    choice = (await gate.ask("POST", "/v1/chat/completions", ASK)).json()["choices"][0]
    assert choice["logprobs"] is None
    assert choice["message"] == {
        "role": "assistant",
        "refusal": None,
        "annotations": [],
        "content": 'He said "refusal": {"message":{"role":"assistant",',
    }
