"""Chat on what speaks Anthropic's Messages only: nothing of a request is lost, and a stream says what a whole says."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pierhead.gateway.dialects import anthropic, ollama_text, responses, to_anthropic
from pierhead.gateway.dialects.chain import through_chat
from pierhead.gateway.faults import Fault
from pierhead.gateway.usage import Usage, merged

ASK = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
FUNCTION = {"name": "tide", "description": "when", "parameters": {"type": "object", "properties": {"at": {}}}}
TOOL = {"type": "function", "function": FUNCTION}
SERVES = frozenset({"messages", "count-tokens"})
PNG = "data:image/png;base64,aGk="


def make(played: Any, **facts: Any) -> Any:
    translation = to_anthropic.make(played.facts("chat", **({"serves": SERVES} | facts)))
    assert translation is not None
    return translation


def asked(played: Any, body: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The message request that a chat becomes."""
    sent = played.run(make(played, **facts), body, played.unasked)
    assert sent.operation == "messages"
    assert sent.stream is bool(body.get("stream"))
    return json.loads(sent.body)


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_conversation_with_tools_and_pictures_is_said_in_anthropics_words(played: Any) -> None:
    body = ASK | {
        "messages": [
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": PNG}}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"at":1}'}},
                    {"id": "c2", "type": "function", "function": {"name": "tide", "arguments": ""}},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "high"},
            {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "low"}]},
            {"role": "user", "content": "go on"},
        ],
        "tools": [TOOL],
    }
    made = asked(played, body)
    assert made["system"] == "be brief"
    user, assistant, results = made["messages"]
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    assert user == {"role": "user", "content": [{"type": "text", "text": "see"}, picture]}
    assert assistant["content"] == [
        {"type": "tool_use", "id": "c1", "name": "tide", "input": {"at": 1}},
        {"type": "tool_use", "id": "c2", "name": "tide", "input": {}},
    ]
    assert [b.get("tool_use_id") for b in results["content"]] == ["c1", "c2", None]
    assert results["content"][0]["content"] == [{"type": "text", "text": "high"}]
    assert made["tools"] == [{"name": "tide", "description": "when", "input_schema": FUNCTION["parameters"]}]


@pytest.mark.parametrize(
    ("more", "made"),
    [
        ({"stop": "x"}, {"stop_sequences": ["x"]}),
        ({"stop": ["x", "y"]}, {"stop_sequences": ["x", "y"]}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"user": "u"}, {"metadata": {"user_id": "u"}}),
        ({"safety_identifier": "u"}, {"metadata": {"user_id": "u"}}),
        ({"stream": True}, {"stream": True}),
        ({"n": 1, "logprobs": False, "store": False, "seed": None, "frequency_penalty": 0}, {}),
        ({"reasoning_effort": "minimal"}, {"output_config": {"effort": "low"}}),
        ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}),
        ({"response_format": {"type": "text"}}, {}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"a": 1}, "strict": True},
                }
            },
            {"output_config": {"format": {"type": "json_schema", "schema": {"a": 1}}}},
        ),
    ],
)
def test_settings_are_translated(played: Any, more: dict[str, Any], made: dict[str, Any]) -> None:
    plain = asked(played, ASK)
    assert asked(played, ASK | more) == plain | made


@pytest.mark.parametrize(
    ("choice", "made"),
    [
        ("auto", {"type": "auto"}),
        ("none", {"type": "none"}),
        ("required", {"type": "any"}),
        ({"type": "function", "function": {"name": "tide"}}, {"type": "tool", "name": "tide"}),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOL]}}, {"type": "any"}),
    ],
)
def test_choices_of_tools_are_translated(played: Any, choice: Any, made: dict[str, Any]) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    body = ASK | {"tools": [TOOL, other], "tool_choice": choice}
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        choice["allowed_tools"]["tools"] = [{"type": "function", "function": {"name": "tide"}}]
        assert [tool["name"] for tool in asked(played, body)["tools"]] == ["tide"]
    assert asked(played, body)["tool_choice"] == made
    single = asked(played, body | {"parallel_tool_calls": False})["tool_choice"]
    assert single == made | ({"disable_parallel_tool_use": True} if made["type"] != "none" else {})


def test_an_answer_always_has_a_limit_and_never_a_greater_one_than_granted(played: Any) -> None:
    free = {"model": "m", "messages": ASK["messages"]}
    assert asked(played, free)["max_tokens"] == 4096
    assert asked(played, free, cap=7)["max_tokens"] == 7
    assert asked(played, free | {"max_completion_tokens": 9, "max_tokens": 3})["max_tokens"] == 9
    assert asked(played, free | {"max_completion_tokens": 9}, cap=7)["max_tokens"] == 7


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"logprobs": True},
        {"seed": 1},
        {"temperature": 1.5},
        {"presence_penalty": 0.5},
        {"logit_bias": {"1": 2}},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["text", "audio"]},
        {"messages": []},
        {"messages": [{"role": "user", "content": "x", "name": "bob"}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,§"}}]}
            ]
        },
        {"messages": [{"role": "tool", "content": "x"}]},
        {"tools": [{"type": "web_search"}]},
        {"tool_choice": "maybe"},
        {"unheard_of": 1},
    ],
)
def test_what_anthropics_api_cannot_say_is_refused_by_name(played: Any, more: dict[str, Any]) -> None:
    with pytest.raises(Fault) as caught:
        asked(played, ASK | more)
    assert caught.value.status == 400
    assert next(iter(more)) in caught.value.message


WORDS = st.text(min_size=1, max_size=20)
TEXT = st.builds(lambda t: {"type": "text", "text": t}, WORDS)
PICTURE = st.builds(lambda u: {"type": "image", "source": {"type": "url", "url": f"https://{u}"}}, WORDS)
VALUES = st.none() | st.booleans() | st.integers(-9, 9) | WORDS | st.lists(WORDS, max_size=2)
USE = st.builds(
    lambda i, n, v: {"type": "tool_use", "id": i, "name": n, "input": v},
    WORDS,
    WORDS,
    st.dictionaries(WORDS, VALUES, max_size=2),
)
RESULT = st.builds(
    lambda i, c: {"type": "tool_result", "tool_use_id": i, "content": c}, WORDS, st.lists(TEXT, min_size=1, max_size=3)
)
USER = st.builds(
    lambda r, b: {"role": "user", "content": r + b}, st.lists(RESULT, max_size=2), st.lists(TEXT | PICTURE, min_size=1)
)
ASSISTANT = st.builds(
    lambda t, c: {"role": "assistant", "content": [{"type": "text", "text": t}, *c]}, WORDS, st.lists(USE, max_size=2)
)
TURNS = st.lists(st.tuples(USER, ASSISTANT), min_size=1, max_size=3).map(
    lambda turns: [m for pair in turns for m in pair]
)


@settings(max_examples=150, deadline=None)
@given(turns=TURNS, system=WORDS)
def test_what_came_from_anthropics_words_goes_back_into_them(played: Any, turns: Any, system: str) -> None:
    body = {"model": "m", "max_tokens": 5, "system": system, "messages": turns}
    there = anthropic.make(played.facts("messages", serves=frozenset({"chat"})))
    chat = played.run(there, body, played.unasked)
    back = asked(played, msgspec.json.decode(chat.body))
    assert back["messages"] == turns
    assert back["system"] == system


# --- answers ----------------------------------------------------------------------------------------------------------

USAGE = {"input_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 0, "output_tokens": 4}
CONTENT = [
    {"type": "thinking", "thinking": "hm", "signature": "s"},
    {"type": "text", "text": "It is "},
    {"type": "text", "text": "high."},
    {"type": "tool_use", "id": "c1", "name": "tide", "input": {"at": 1}},
    {"type": "tool_use", "id": "c2", "name": "tide", "input": {}},
]


def stream(reason: str = "tool_use") -> bytes:
    """The same answer as events, named as Anthropic names them."""
    start = {"role": "assistant", "content": [], "usage": USAGE | {"output_tokens": 1}}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": start}, {"type": "ping"}]
    for index, block in enumerate(CONTENT):
        empty = {"thinking": "", "signature": "", "text": "", "input": {}}
        begun = {k: empty.get(k, v) for k, v in block.items()}
        deltas: list[dict[str, Any]] = []
        if block["type"] == "thinking":
            deltas = [{"type": "thinking_delta", "thinking": "hm"}, {"type": "signature_delta", "signature": "s"}]
        elif block["type"] == "text":
            deltas = [{"type": "text_delta", "text": letter} for letter in block["text"]]
        elif block["input"]:
            deltas = [{"type": "input_json_delta", "partial_json": part} for part in ("", '{"at"', ":1}")]
        events.append({"type": "content_block_start", "index": index, "content_block": begun})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    events.append({"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 4}})
    events.append({"type": "message_stop"})
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events)


def chunks(raw: bytes) -> list[dict[str, Any]]:
    assert raw.endswith(b"data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in raw.decode().split("\n\n")[:-2]]


def put_together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for part in parts:
        for choice in part["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"id": call["id"], "type": call["type"], "function": call["function"]})
                else:
                    message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"]
    return message


def test_a_whole_answer_is_a_completion(played: Any) -> None:
    body = json.dumps({"type": "message", "content": CONTENT, "stop_reason": "tool_use", "usage": USAGE}).encode()
    made = json.loads(make(played).answer(body, Usage(8, 4, 3, True)))
    choice = made["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "It is high."
    assert choice["message"]["reasoning_content"] == "hm"
    assert [json.loads(c["function"]["arguments"]) for c in choice["message"]["tool_calls"]] == [{"at": 1}, {}]
    assert made["usage"]["prompt_tokens"] == 8
    assert made["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert (made["id"], made["model"], made["created"]) == ("chatcmpl-req_1", "m", 1700000000)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 10**6), max_size=12), ends=st.sampled_from([b"\n", b"\r\n"]))
def test_a_stream_says_the_same_wherever_it_is_cut(played: Any, cuts: list[int], ends: bytes) -> None:
    translation = make(played)
    played.run(translation, ASK | {"stream": True, "stream_options": {"include_usage": True}}, played.unasked)
    raw = stream().replace(b"\n", ends)
    out = b"".join(translation.events(piece) for piece in played.pieces(raw, cuts)) + translation.end(Usage())
    *parts, last = chunks(out)
    said = put_together(parts)
    assert (said["content"], said["reasoning_content"], said["finish_reason"]) == ("It is high.", "hm", "tool_calls")
    assert [c["id"] for c in said["tool_calls"]] == ["c1", "c2"]
    assert json.loads(said["tool_calls"][0]["function"]["arguments"]) == {"at": 1}
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (8, 4)


def test_the_usage_is_told_only_to_who_asks(played: Any) -> None:
    translation = make(played)
    played.run(translation, ASK | {"stream": True}, played.unasked)
    assert b'"usage"' not in translation.events(stream()) + translation.end(Usage())


@pytest.mark.parametrize(
    ("reason", "word"),
    [("end_turn", "stop"), ("max_tokens", "length"), ("stop_sequence", "stop"), ("refusal", "content_filter")],
)
def test_why_an_answer_ended_has_openais_word(played: Any, reason: str, word: str) -> None:
    body = json.dumps({"content": [], "stop_reason": reason}).encode()
    assert json.loads(make(played).answer(body, Usage()))["choices"][0]["finish_reason"] == word
    translation = make(played)
    out = translation.events(stream(reason)) + translation.end(Usage())
    assert chunks(out)[-1]["choices"][0]["finish_reason"] == word


def test_a_stream_that_breaks_off_or_fails_is_a_fault(played: Any) -> None:
    translation = make(played)
    translation.events(stream()[:-60])
    with pytest.raises(Fault):
        translation.end(Usage())
    with pytest.raises(Fault, match="busy") as caught:
        make(played).events(
            b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"busy"}}\n\n'
        )
    assert caught.value.status == 503


@pytest.mark.parametrize("body", [b"", b"nonsense", b"[]", b'{"content":5}', b"\xff"])
def test_nonsense_is_told_as_the_others_fault(played: Any, body: bytes) -> None:
    with pytest.raises(Fault) as caught:
        make(played).answer(body, Usage())
    assert caught.value.status == 502


def test_the_usage_of_a_stream_is_told_in_two_parts() -> None:
    assert merged(Usage(8, 1, 3, True), Usage(0, 4, 0, True)) == Usage(8, 4, 3, True)
    assert merged(Usage(8, 1, 3, True), Usage(9, 4, 2, True)) == Usage(9, 4, 2, True)
    assert merged(Usage(8, 1, 3, True), Usage()) == Usage(8, 1, 3, True)


# --- by way of chat ---------------------------------------------------------------------------------------------------


def test_ollamas_chat_is_made_of_messages_and_its_stream_of_their_events(played: Any) -> None:
    facts = played.facts("ollama-chat", serves=SERVES)
    translation = through_chat(ollama_text.make, facts)
    assert translation is not None
    body = {
        "model": "m",
        "messages": ASK["messages"],
        "options": {"num_predict": 7, "temperature": 0.5},
        "think": False,
    }
    sent = played.run(translation, body, played.unasked)
    made = json.loads(sent.body)
    assert (sent.operation, sent.stream) == ("messages", True)
    assert (made["max_tokens"], made["temperature"], made["stream"]) == (7, 0.5, True)
    lines = (translation.events(stream()) + translation.end(Usage(8, 4, 3, True))).splitlines()
    records = [json.loads(line) for line in lines]
    assert "".join(r["message"]["content"] for r in records) == "It is high."
    assert (records[-1]["done"], records[-1]["prompt_eval_count"], records[-1]["eval_count"]) == (True, 8, 4)


def test_a_response_is_made_of_a_message(played: Any) -> None:
    facts = played.facts("responses", serves=SERVES)
    translation = through_chat(responses.make, facts)
    assert translation is not None
    sent = played.run(translation, {"model": "m", "input": "hi", "store": False}, played.unasked)
    assert sent.operation == "messages"
    body = json.dumps(
        {"content": [{"type": "text", "text": "yes"}], "stop_reason": "end_turn", "usage": USAGE}
    ).encode()
    made = json.loads(translation.answer(body, Usage(8, 4, 3, True)))
    assert made["output"][-1]["content"][0]["text"] == "yes"


def test_what_is_not_made_of_chat_stays_refused(played: Any) -> None:
    assert through_chat(to_anthropic.make, played.facts("chat", serves=SERVES)) is None
    assert through_chat(ollama_text.make, played.facts("ollama-chat", serves=frozenset({"embeddings"}))) is None
