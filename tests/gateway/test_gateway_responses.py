"""Stored responses and conversations through a real gateway process; the engine is scripted."""

from __future__ import annotations

import json
import os
import signal

import pytest

from pierhead.gateway import link

ASK = {"model": "m", "input": "hi"}


@pytest.fixture
async def served(new_gate, new_engine, talks, lock, tmp_path):
    """A gateway with a folder of its own, two keys and one engine."""
    gate = await new_gate(extra={"state": str(tmp_path)}, require_key=True)
    engine = await new_engine(talks)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)), **lock("ann", "bob"))

    async def ask(method: str, path: str, body=None, key: str = "ann"):
        return await gate.ask(method, f"/v1{path}", body, headers={"authorization": f"Bearer {key}"})

    ask.gate, ask.engine = gate, engine
    return ask


async def test_a_response_is_found_again_by_its_key_alone_and_can_be_deleted(served) -> None:
    made = (await served("POST", "/responses", ASK)).json()
    path = f"/responses/{made['id']}"
    assert (await served("GET", path)).json() == made
    items = (await served("GET", f"{path}/input_items")).json()
    assert [i["content"][0]["text"] for i in items["data"]] == ["hi"]
    for method, tail in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
        answer = await served(method, path + tail, key="bob")
        assert (answer.status, answer.json()["error"]["code"]) == (404, "response_not_found")
    going_on = ASK | {"previous_response_id": made["id"]}
    assert (await served("POST", "/responses", going_on, key="bob")).status == 400
    assert (await served("POST", f"{path}/cancel")).status == 400
    assert (await served("DELETE", path)).json()["deleted"] is True
    assert (await served("GET", path)).status == 404
    assert (await served("POST", "/responses", going_on)).json()["error"]["code"] == "previous_response_not_found"


async def test_a_response_that_shall_not_be_stored_is_not(served) -> None:
    made = (await served("POST", "/responses", ASK | {"store": False})).json()
    assert (await served("GET", f"/responses/{made['id']}")).status == 404


async def test_a_streamed_response_is_stored_before_its_last_event_and_survives_kill_9(
    served, new_gate, lock, tmp_path
) -> None:
    answer = await served("POST", "/responses", ASK | {"stream": True})
    last = json.loads(answer.body.decode().split("\n\n")[-3].partition("data: ")[2])
    assert last["type"] == "response.completed"
    os.kill(served.gate.pid, signal.SIGKILL)
    await served.gate.process.wait()
    gate = await new_gate(extra={"state": str(tmp_path)}, require_key=True)
    await gate.serve(**lock("ann"))
    headers = {"authorization": "Bearer ann"}
    found = await gate.ask("GET", f"/v1/responses/{last['response']['id']}", headers=headers)
    assert found.json() == last["response"]


async def test_an_engine_that_breaks_in_the_middle_leaves_nothing_stored(served, new_engine) -> None:
    async def break_off(call) -> None:
        await call.sse()
        await call.event({"choices": [{"index": 0, "delta": {"content": "Ahoy"}}]})
        call.reset()

    served.engine.handler = break_off
    answer = await served("POST", "/responses", ASK | {"stream": True})
    events = [json.loads(e.partition("data: ")[2]) for e in answer.body.decode().split("\n\n")[:-1]]
    assert [e["type"] for e in events[-2:]] == ["response.failed", "error"]
    assert (await served("GET", f"/responses/{events[0]['response']['id']}")).status == 404


async def test_a_long_answer_is_translated_and_stored_too(served) -> None:
    async def talk(call) -> None:
        said = {"role": "assistant", "content": "x" * 300_000}
        await call.json(
            {"choices": [{"index": 0, "finish_reason": "stop", "message": said}], "usage": {"prompt_tokens": 1}}
        )

    served.engine.handler = talk
    made = (await served("POST", "/responses", ASK)).json()
    assert len(made["output"][0]["content"][0]["text"]) == 300_000
    assert (await served("GET", f"/responses/{made['id']}")).json() == made


async def test_a_conversation_grows_with_its_responses_and_can_be_edited(served) -> None:
    begun = {"items": [{"role": "user", "content": "I am Ann."}], "metadata": {"trip": "7"}}
    made = (await served("POST", "/conversations", begun)).json()
    path = f"/conversations/{made['id']}"
    assert (made["object"], made["metadata"]) == ("conversation", {"trip": "7"})
    assert (await served("POST", "/responses", ASK | {"conversation": made["id"]})).status == 200
    items = (await served("GET", f"{path}/items?order=asc")).json()["data"]
    assert [i["content"][0]["text"] for i in items] == ["I am Ann.", "hi", "Ahoy"]
    asked = json.loads(served.engine.calls[-1].body)["messages"]
    assert [m["content"] for m in asked] == ["I am Ann.", "hi"]
    assert (await served("POST", path, {"metadata": {"trip": "8"}})).json()["metadata"] == {"trip": "8"}
    added = (await served("POST", f"{path}/items", {"items": [{"role": "user", "content": "more"}]})).json()["data"]
    assert (await served("GET", f"{path}/items/{added[0]['id']}")).json() == added[0]
    assert (await served("DELETE", f"{path}/items/{items[0]['id']}")).json()["id"] == made["id"]
    newest = (await served("GET", f"{path}/items?limit=2")).json()
    assert [i["content"][0]["text"] for i in newest["data"]] == ["more", "Ahoy"]
    assert newest["has_more"] is True
    rest = (await served("GET", f"{path}/items?after={newest['last_id']}")).json()
    assert [i["content"][0]["text"] for i in rest["data"]] == ["hi"]
    for method, tail in (
        ("GET", ""),
        ("POST", ""),
        ("DELETE", ""),
        ("GET", "/items"),
        ("GET", f"/items/{added[0]['id']}"),
    ):
        body = {} if method == "POST" else None
        assert (await served(method, path + tail, body, key="bob")).status == 404
    assert (await served("DELETE", path)).json()["deleted"] is True
    assert (await served("GET", path)).status == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/conversations", {"items": [{"type": "web_search_call"}]}, 400),
        ("POST", "/conversations", {"items": [{"type": "item_reference", "id": "x"}]}, 400),
        ("POST", "/conversations", {"items": [{"role": "user", "content": "x"}] * 101}, 400),
        ("POST", "/conversations", {"metadata": {"a": 1}}, 400),
        ("POST", "/conversations", {"foo": 1}, 400),
        ("POST", "/conversations", b"[" * 100_000, 400),
        ("GET", "/conversations", None, 405),
        ("GET", "/responses/resp_x/nothing", None, 404),
        ("POST", "/responses/compact", {}, 404),
        ("GET", "/conversations/resp_x", None, 404),
        ("DELETE", "/responses/conv_x", None, 404),
        ("POST", "/responses/resp_x", {}, 405),
    ],
)
async def test_odd_requests_for_stored_things_are_refused(served, method, path, body, status) -> None:
    answer = await served(method, path, body)
    assert answer.status == status
    assert answer.json()["error"]["message"]


async def test_a_gateway_without_a_folder_keeps_answers_while_it_lives(gate, new_engine, talks) -> None:
    engine = await new_engine(talks)
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    made = (await gate.ask("POST", "/v1/responses", ASK)).json()
    assert (await gate.ask("GET", f"/v1/responses/{made['id']}")).json() == made
