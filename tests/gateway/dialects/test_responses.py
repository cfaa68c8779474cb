"""The Responses API on a chat engine: items and settings arrive, history is found, streams say what wholes say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pierhead.gateway.dialects import responses
from pierhead.gateway.dialects.base import Load
from pierhead.gateway.faults import Fault
from pierhead.gateway.usage import Usage

ASK = {"model": "m", "input": "hi"}
TOOL = {"type": "function", "name": "tide", "parameters": {"type": "object"}}
USAGE = Usage(12, 3, 8, True)


class Shelf:
    """The store, played; and an engine whose every word is one token."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.asked: list[Any] = []

    def __call__(self, step: Any) -> bytes | None:
        self.asked.append(step)
        if isinstance(step, Load):
            return self.kept.get(step.key)
        body = json.loads(step.body)
        if step.operation == "llamacpp-template":
            texts = [m["content"] if isinstance(m["content"], str) else "" for m in body["messages"]]
            return json.dumps({"prompt": " ".join(texts)}).encode()
        return json.dumps({"tokens": body["content"].split()}).encode()

    def keep(self, saves: Any) -> None:
        for save in saves:
            self.kept[save.key] = (self.kept.get(save.key, b"") if save.append else b"") + save.body


def translated(played, body: Any, shelf: Any = None, **facts: Any) -> tuple[Any, dict[str, Any]]:
    """The translation of a request, and the chat request that it becomes."""
    translation = responses.make(played.facts("responses", **{"nonce": "n"} | facts))
    assert translation is not None
    sent = played.run(translation, body, shelf or played.unasked)
    assert sent.operation == "chat"
    return translation, json.loads(sent.body)


def chat_answer(finish: str = "stop", **message: Any) -> bytes:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}
    return json.dumps({"choices": [choice]}).encode()


def respond(played, shelf: Shelf, nonce: str, said: str, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """One turn: the chat request and the response, which is stored."""
    translation, asked = translated(played, {"model": "m"} | body, shelf, nonce=nonce)
    made = json.loads(translation.answer(chat_answer(content=said), USAGE))
    shelf.keep(translation.saves)
    return asked, made


# --- requests ---------------------------------------------------------------------------------------------------------

WORDS = st.text(min_size=1, max_size=20)
LINES = WORDS.filter(lambda text: "\n" not in text)  # thoughts one after the other become lines
GIVEN = st.one_of(
    st.builds(lambda t: {"type": "input_text", "text": t}, WORDS),
    st.builds(lambda u: {"type": "input_image", "image_url": u}, WORDS),
)
ITEM = st.one_of(
    st.builds(lambda t: {"role": "user", "content": t}, WORDS),
    st.builds(lambda p: {"type": "message", "role": "user", "content": p}, st.lists(GIVEN, min_size=1, max_size=3)),
    st.builds(lambda t: {"role": "assistant", "content": [{"type": "output_text", "text": t}]}, WORDS),
    st.builds(
        lambda t: {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": t}]}, LINES
    ),
    st.builds(lambda c, n, a: {"type": "function_call", "call_id": c, "name": n, "arguments": a}, WORDS, WORDS, WORDS),
    st.builds(lambda c, o: {"type": "function_call_output", "call_id": c, "output": o}, WORDS, WORDS),
)


def part(given: dict[str, Any]) -> dict[str, Any]:
    if given["type"] == "input_image":
        return {"type": "image_url", "image_url": {"url": given["image_url"]}}
    return {"type": "text", "text": given["text"]}


def meaning(item: dict[str, Any]) -> list[Any]:
    """What an item says, in order."""
    kind = item.get("type", "message")
    if kind == "message":
        content = item["content"] if isinstance(item["content"], list) else [{"type": "x", "text": item["content"]}]
        return [(item["role"], part(p)) for p in content]
    if kind == "reasoning":
        return [("thought", item["content"][0]["text"])]
    if kind == "function_call":
        return [("call", item["call_id"], item["name"], item["arguments"])]
    return [("result", item["call_id"], item["output"])]


def read_back(messages: list[dict[str, Any]]) -> list[Any]:
    """What a chat request's messages say, in the same order."""
    said: list[Any] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            said.append(("result", message["tool_call_id"], content))
            continue
        if message.get("reasoning_content"):
            said += [("thought", text) for text in message["reasoning_content"].split("\n")]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
        said += [(message["role"], p) for p in parts]
        said += [("call", c["id"], *c["function"].values()) for c in message.get("tool_calls", ())]
    return said


@settings(max_examples=200, deadline=None)
@given(items=st.lists(ITEM, min_size=1, max_size=8))
def test_every_item_can_be_read_back_from_the_chat_request(played, items: list[dict[str, Any]]) -> None:
    _, asked = translated(played, ASK | {"input": items})
    assert read_back(asked["messages"]) == [said for item in items for said in meaning(item)]


def test_every_setting_arrives_under_its_chat_name_and_is_echoed(played) -> None:
    schema = {"type": "object", "properties": {}}
    body = ASK | {
        "instructions": "Be brief.",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 40,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "tide"},
        "parallel_tool_calls": False,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}, "verbosity": "low"},
        "reasoning": {"effort": "high", "summary": "auto"},
        "metadata": {"trip": "7"},
        "user": "u1",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "store": False,
        "stream": True,
        "stream_options": {"include_obfuscation": False},
    }
    translation, asked = translated(played, body)
    assert asked == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 40,
        "tools": [{"type": "function", "function": {"name": "tide", "strict": True, "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "tide"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        "verbosity": "low",
        "reasoning_effort": "high",
        "user": "u1",
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    made = json.loads(translation.answer(chat_answer(content="x"), USAGE))
    for name in (
        "instructions",
        "temperature",
        "top_p",
        "max_output_tokens",
        "tool_choice",
        "metadata",
        "store",
        "user",
    ):
        assert made[name] == body[name]
    assert made["text"]["format"]["schema"] == schema
    assert translation.saves == ()


def test_allowed_tools_keep_their_mode(played) -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "tide"}]}
    _, asked = translated(played, ASK | {"tools": [TOOL], "tool_choice": choice})
    named = {"type": "function", "function": {"name": "tide"}}
    assert asked["tool_choice"] == {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}


def test_instructions_and_developers_are_one_system_message(played) -> None:
    items = [{"role": "developer", "content": "One word."}, {"role": "user", "content": "hi"}]
    _, asked = translated(played, ASK | {"instructions": "Be brief.", "input": items})
    assert asked["messages"][0] == {"role": "system", "content": "Be brief.\n\nOne word."}


def test_a_text_file_is_read(played) -> None:
    file = {"type": "input_file", "filename": "tide.txt", "file_data": "data:text/plain;base64,RWJi"}
    _, asked = translated(played, ASK | {"input": [{"role": "user", "content": [file]}]})
    assert "Ebb" in asked["messages"][0]["content"]
    assert "tide.txt" in asked["messages"][0]["content"]


def item(**members: Any) -> dict[str, Any]:
    return ASK | {"input": [members]}


PDF = {"type": "input_file", "file_data": "data:application/pdf;base64,aGk="}


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"model": "m"}, "input: is missing"),
        (ASK | {"input": 7}, "input: must be a string"),
        (ASK | {"input": ["x"]}, "input.0: must be an object"),
        (ASK | {"foo": 1}, "foo: is not understood"),
        (ASK | {"background": True}, "background: answers in the background"),
        (ASK | {"prompt": {"id": "p"}}, "prompt: stored prompts"),
        (ASK | {"previous_response_id": "resp_a", "conversation": "conv_a"}, "conversation: cannot be combined"),
        (ASK | {"tools": [{"type": "web_search"}]}, "tools.0: 'web_search' runs on OpenAI's servers"),
        (ASK | {"tool_choice": "required"}, "tool_choice: asks for a call"),
        (ASK | {"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        (ASK | {"include": ["everything"]}, "include: 'everything'"),
        (ASK | {"metadata": {"a": 1}}, "metadata: must be at most 16 texts"),
        (ASK | {"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        (ASK | {"max_output_tokens": 0}, "max_output_tokens: must be 1 or more"),
        (ASK | {"truncation": "middle"}, "truncation: must be one of"),
        (item(type="web_search_call", id="ws_1"), "input.0: an item of type 'web_search_call' runs on OpenAI's"),
        (item(type="reasoning", summary=[], encrypted_content="x"), "input.0: encrypted reasoning"),
        (item(role="user", content=[{"type": "input_image", "file_id": "f"}]), "input.0.content.0.file_id"),
        (item(role="user", content=[PDF]), "only text files are read"),
        (item(role="user", content=[{"type": "input_audio"}]), "input.0.content.0.type"),
        (item(role="critic", content="x"), "input.0.role"),
        (item(role="user", content="x", id=7), "input.0.id: must be a string"),
        (item(type="function_call", call_id="c", name="n"), "input.0.arguments: is missing"),
        (item(type="item_reference", id="rs_none"), "input.0: there is no item"),
        (b"[" * 100_000, "not usable JSON"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_its_place(played, body: Any, where: str) -> None:
    with pytest.raises(Fault) as caught:
        translated(played, body)
    assert caught.value.status == 400
    assert where in caught.value.message


# --- history ----------------------------------------------------------------------------------------------------------


def test_a_response_goes_on_from_the_one_before_and_from_all_before_that(played) -> None:
    shelf = Shelf()
    _, first = respond(played, shelf, "a", "one", input="1", instructions="Count.")
    _, second = respond(played, shelf, "b", "two", input="2", previous_response_id=first["id"])
    asked, third = respond(played, shelf, "c", "three", input="3", previous_response_id=second["id"])
    said = [(m["role"], m["content"]) for m in asked["messages"]]
    spoken = [("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two"), ("user", "3")]
    assert said == spoken  # the instructions of earlier responses hold for these alone
    assert third["previous_response_id"] == second["id"]


@settings(max_examples=30, deadline=None)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_a_chain_a_conversation_and_a_client_that_repeats_everything_ask_the_same(played, turns) -> None:
    shelf = Shelf()
    shelf.kept["conv_x"] = b'{"id":"conv_x"}\n'
    repeated: list[dict[str, Any]] = []
    previous: dict[str, Any] = {}
    for number, (user, said) in enumerate(turns):
        repeated.append({"role": "user", "content": user})
        plain, _ = respond(played, shelf, f"p{number}", said, input=repeated)
        chained, made = respond(played, shelf, f"c{number}", said, input=user, **previous)
        kept, _ = respond(played, shelf, f"v{number}", said, input=user, conversation="conv_x")
        assert plain == chained == kept
        repeated += made["output"]
        previous = {"previous_response_id": made["id"]}


def test_a_reference_finds_its_item_in_the_chain_and_in_other_responses(played) -> None:
    shelf = Shelf()
    _, first = respond(played, shelf, "a", "one", input="1")
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    for extra in ({}, {"previous_response_id": first["id"]}):
        asked, _ = respond(played, shelf, "b", "x", input=[reference], **extra)
        assert asked["messages"][-1] == {"role": "assistant", "content": "one"}


def test_a_history_that_is_not_there_is_refused(played) -> None:
    for extra, status in (({"previous_response_id": "resp_no"}, 400), ({"conversation": "conv_no"}, 404)):
        with pytest.raises(Fault) as caught:
            translated(played, ASK | extra, Shelf())
        assert caught.value.status == status


def test_names_of_other_kinds_are_not_asked_of_the_store(played) -> None:
    shelf = Shelf()
    shelf.kept["conv_x"] = b'{"id":"conv_x"}\n'
    with pytest.raises(Fault):
        translated(played, ASK | {"previous_response_id": "conv_x"}, shelf)
    assert not shelf.asked


def test_truncation_leaves_out_the_oldest_messages_but_not_the_instructions(played) -> None:
    turns = [{"role": role, "content": f"{n} " * 10} for n in range(10) for role in ("user", "assistant")]
    body = ASK | {"instructions": "Be brief.", "input": [*turns, {"role": "user", "content": "now"}]}
    body |= {"truncation": "auto", "max_output_tokens": 20}
    _, asked = translated(played, body, Shelf(), context=100)
    words = sum(len(m["content"].split()) for m in asked["messages"])
    assert asked["messages"][0]["content"] == "Be brief."
    assert asked["messages"][-1]["content"] == "now"
    assert 50 < words <= 80
    _, whole = translated(played, body, Shelf(), context=4000)
    assert len(whole["messages"]) == 22


def test_the_tokens_of_an_input_are_counted_without_an_answer(played) -> None:
    counting = responses.make_count(played.facts("input-tokens", nonce="n"))
    assert counting is not None
    reply = played.run(counting, ASK | {"input": "one two three"}, Shelf())
    assert json.loads(reply.body) == {"object": "response.input_tokens", "input_tokens": 3}


# --- answers and streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finish", "status", "reason"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
    ],
)
def test_an_end_has_its_status(played, finish: str, status: str, reason: str | None) -> None:
    translation, _ = translated(played, ASK)
    made = json.loads(translation.answer(chat_answer(finish, content="x"), USAGE))
    assert (made["status"], (made["incomplete_details"] or {}).get("reason")) == (status, reason)
    assert made["output"][0]["status"] == status
    assert made["usage"]["input_tokens_details"] == {"cached_tokens": 8}


TEXTS = st.lists(WORDS, max_size=4)
CALLS = st.lists(st.tuples(WORDS, st.lists(WORDS, max_size=3)), max_size=2)


def deltas(thoughts: list[str], texts: list[str], calls: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"role": "assistant", "content": None}]
    made += [{"reasoning_content": t} for t in thoughts] + [{"content": t} for t in texts]
    for index, (name, pieces) in enumerate(calls):
        made.append({"tool_calls": [{"index": index, "id": f"c{index}", "function": {"name": name, "arguments": ""}}]})
        made += [{"tool_calls": [{"index": index, "function": {"arguments": p}}]} for p in pieces]
    return made


def follow(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that a stream ends with; every event must say what those before it lead to."""
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    done: list[dict[str, Any]] = []
    text = ""
    for event in events[2:-1]:
        kind = event["type"]
        assert event["output_index"] == len(done)
        if kind == "response.output_item.added":
            text = ""
        elif kind == "response.output_item.done":
            done.append(event["item"])
        elif kind.endswith(".delta") and "summary" not in kind:
            text += event["delta"]
        elif kind in ("response.output_text.done", "response.reasoning_text.done"):
            assert event["text"] == text
        elif kind == "response.function_call_arguments.done":
            assert event["arguments"] == text
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    assert last["output"] == done
    return last


@settings(max_examples=150, deadline=None)
@given(
    thoughts=TEXTS,
    texts=TEXTS,
    calls=CALLS,
    cuts=st.lists(st.integers(0, 10_000), max_size=12),
    finish=st.sampled_from(["stop", "length"]),
    summary=st.booleans(),
)
def test_a_stream_cut_anywhere_ends_in_the_whole_response(
    played, thoughts, texts, calls, cuts, finish, summary
) -> None:
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": d}]} for d in deltas(thoughts, texts, calls)]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}]
    chunks += [{"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}]
    body = ASK | ({"reasoning": {"summary": "auto"}} if summary else {})
    streaming, _ = translated(played, body | {"stream": True})
    raw = b"".join(streaming.events(p) for p in played.pieces(played.sse(chunks), cuts)) + streaming.end(USAGE)
    assert raw.endswith(b"data: [DONE]\n\n")
    streamed = follow(played.events(raw.removesuffix(b"data: [DONE]\n\n")))

    tool_calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": n, "arguments": "".join(p)}}
        for i, (n, p) in enumerate(calls)
    ]
    message = {"content": "".join(texts), "reasoning_content": "".join(thoughts), "tool_calls": tool_calls or None}
    translation, _ = translated(played, body)
    whole = json.loads(translation.answer(chat_answer(finish, **message), USAGE))
    assert streamed | {"completed_at": 0} == whole | {"completed_at": 0}
    stored, kept = (json.loads(t.saves[0].body)["response"] for t in (streaming, translation))
    assert stored | {"completed_at": 0} == kept | {"completed_at": 0}


def test_a_response_that_fails_on_the_way_says_so_by_its_own_events(played) -> None:
    translation, _ = translated(played, ASK | {"stream": True})
    translation.events(b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n')
    failed, error = played.events(translation.failed(Fault(502, "engine_failed", "gone", source="engine")))
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"]["message"] == "gone"
    assert (error["type"], error["error"]["code"]) == ("error", "engine_failed")


def test_an_empty_list_of_input_is_sent_on_and_breaks_nothing(played):
    _, sent = translated(played, {"model": "m", "input": [], "previous_response_id": None})
    assert sent["messages"] == []
