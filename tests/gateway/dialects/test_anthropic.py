"""Anthropic's Messages on a chat engine: nothing of a request is lost, and a stream says what a whole says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pierhead.gateway.dialects import anthropic
from pierhead.gateway.faults import Fault
from pierhead.gateway.usage import Usage

ASK = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"name": "tide", "description": "when", "input_schema": {"type": "object", "properties": {}}}
KEPT = {"type": "ephemeral"}
LATE = [{"type": "text", "text": "x"}, {"type": "tool_result", "tool_use_id": "t"}]
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}


def asked(played, body: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The chat request that a message becomes."""
    translation = anthropic.make(played.facts("messages", **facts))
    assert translation is not None
    sent = played.run(translation, body, played.unasked)
    assert sent.operation == "chat"
    return json.loads(sent.body)


# --- requests ---------------------------------------------------------------------------------------------------------

WORDS = st.text(min_size=1, max_size=20)
BLOCK = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, WORDS),
    st.builds(lambda u: {"type": "image", "source": {"type": "url", "url": u}}, WORDS),
    st.builds(
        lambda d: {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": d}},
        st.text("abc+/=", min_size=1, max_size=8),
    ),
)
VALUES = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | WORDS, lambda v: st.lists(v, max_size=2))
CALL = st.builds(
    lambda i, n, v: {"type": "tool_use", "id": i, "name": n, "input": v},
    WORDS,
    WORDS,
    st.dictionaries(WORDS, VALUES, max_size=2),
)
RESULT = st.builds(
    lambda i, c, e: {"type": "tool_result", "tool_use_id": i, "content": c, "is_error": e},
    WORDS,
    WORDS | st.lists(BLOCK, min_size=1, max_size=3),
    st.booleans(),
)
THOUGHT = st.builds(lambda t: {"type": "thinking", "thinking": t, "signature": "s"}, WORDS)
USER = st.builds(lambda r, b: {"role": "user", "content": r + b}, st.lists(RESULT, max_size=2), st.lists(BLOCK))
ASSISTANT = st.builds(
    lambda h, t, c: {"role": "assistant", "content": [*h, {"type": "text", "text": t}, *c]},
    st.lists(THOUGHT, max_size=1),
    WORDS,
    st.lists(CALL, max_size=2),
)
CONVERSATION = st.lists(
    USER | ASSISTANT | st.builds(lambda t: {"role": "user", "content": t}, WORDS), min_size=1, max_size=5
)


def part(block: dict[str, Any]) -> dict[str, Any]:
    """One block in chat's words, said once more by the test."""
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    source = block["source"]
    given = source["url"] if source["type"] == "url" else f"data:{source['media_type']};base64,{source['data']}"
    return {"type": "image_url", "image_url": {"url": given}}


def parts(content: Any) -> list[dict[str, Any]]:
    """The content of a chat message as parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


def meaning(message: dict[str, Any]) -> list[Any]:
    """What one of Anthropic's messages says, in order."""
    blocks = message["content"]
    if isinstance(blocks, str):
        blocks = [{"type": "text", "text": blocks}]
    said: list[Any] = []
    for block in blocks:
        if block["type"] == "tool_result":
            inside = (
                block["content"] if isinstance(block["content"], list) else [{"type": "text", "text": block["content"]}]
            )
            told = [part(b) for b in inside]
            said.append(("result", block["tool_use_id"], block["is_error"], told))
        elif block["type"] == "tool_use":
            said.append(("call", block["id"], block["name"], block["input"]))
        elif block["type"] == "thinking":
            said.append(("thought", block["thinking"]))
        else:
            said.append((message["role"], part(block)))
    return said


def read_back(messages: list[dict[str, Any]], failed: set[str]) -> list[Any]:
    """What a chat request's messages say, in the same order; ``failed`` are the calls whose results are errors."""
    said: list[Any] = []
    for message in messages:
        content = parts(message["content"])
        if message["role"] == "tool":
            error = message["tool_call_id"] in failed
            if error:
                assert content[0]["text"].startswith("Error: ")
                rest = content[0]["text"].removeprefix("Error: ")
                content = ([{"type": "text", "text": rest}] if rest else []) + content[1:]
            said.append(("result", message["tool_call_id"], error, content))
            continue
        if message.get("reasoning_content"):
            said.append(("thought", message["reasoning_content"]))
        said += [(message["role"], p) for p in content]
        for call in message.get("tool_calls", ()):
            said.append(("call", call["id"], call["function"]["name"], json.loads(call["function"]["arguments"])))
    return said


@settings(max_examples=150, deadline=None)
@given(conversation=CONVERSATION)
def test_every_block_can_be_read_back_from_the_chat_request(played, conversation: list[dict[str, Any]]) -> None:
    results = [b for m in conversation if isinstance(m["content"], list) for b in m["content"] if "is_error" in b]
    if len({b["tool_use_id"] for b in results}) < len(results):
        return  # two results for one call
    made = asked(played, ASK | {"messages": conversation})
    failed = {b["tool_use_id"] for b in results if b["is_error"]}
    assert read_back(made["messages"], failed) == [said for m in conversation for said in meaning(m)]


def test_every_setting_arrives_under_its_chat_name(played) -> None:
    made = asked(
        played,
        ASK
        | {
            "system": [{"type": "text", "text": "Be", "cache_control": KEPT}, {"type": "text", "text": "brief"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "stop_sequences": ["END"],
            "metadata": {"user_id": "u1"},
            "service_tier": "auto",
            "tools": [TOOL],
            "tool_choice": {"type": "tool", "name": "tide", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
            "stream": True,
        },
    )  # fmt: skip
    assert made == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be\nbrief"}, {"role": "user", "content": "hi"}],
        "max_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "stop": ["END"],
        "verbose": True,
        "user": "u1",
        "tools": [
            {
                "type": "function",
                "function": {"name": "tide", "description": "when", "parameters": TOOL["input_schema"]},
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "tide"}},
        "parallel_tool_calls": False,
        "thinking_budget_tokens": 1024,
        "chat_template_kwargs": {"enable_thinking": True},
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
        },
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
    }


@pytest.mark.parametrize(
    ("choice", "word"), [({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none")]
)
def test_a_choice_of_tools_has_chats_word(played, choice: dict[str, str], word: str) -> None:
    made = asked(played, ASK | {"tools": [TOOL], "tool_choice": choice})
    assert made["tool_choice"] == word
    assert made["parallel_tool_calls"] is True  # as Anthropic's models may, unless told not to
    assert "parallel_tool_calls" not in asked(played, ASK | {"tools": [TOOL]}, call_prefix="<call>")


def test_documents_and_search_results_become_text(played) -> None:
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Ebb at six."}}
    result = {
        "type": "search_result",
        "title": "Tides",
        "source": "almanac",
        "content": [{"type": "text", "text": "x"}],
    }
    content = [document | {"title": "Almanac", "context": "of 2026"}, result]
    made = asked(played, ASK | {"messages": [{"role": "user", "content": content}]})
    texts = [part["text"] for part in made["messages"][0]["content"]]
    for wanted, text in zip((("Ebb at six.", "Almanac", "of 2026"), ("Tides", "almanac", "x")), texts, strict=True):
        assert all(word in text for word in wanted)


def test_the_smaller_of_the_wish_and_the_allowance_bounds_the_answer(played) -> None:
    assert asked(played, ASK, cap=7)["max_tokens"] == 7
    assert asked(played, ASK, cap=70)["max_tokens"] == 50


def said(**block: Any) -> dict[str, Any]:
    """A request whose user says this block."""
    return ASK | {"messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (ASK | {"max_tokens": None}, "max_tokens: is missing"),
        (ASK | {"max_tokens": 0}, "max_tokens: must be 1 or more"),
        (ASK | {"max_tokens": True}, "max_tokens: must be an integer"),
        (ASK | {"messages": []}, "messages: at least one"),
        (ASK | {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (ASK | {"messages": [{"role": "user"}]}, "messages.0.content: is missing"),
        (ASK | {"temperature": 1.5}, "temperature: must be between"),
        (ASK | {"foo": 1}, "foo: is not understood"),
        (ASK | {"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        (ASK | {"container": "c"}, "container"),
        (ASK | {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0: a tool of type"),
        (ASK | {"tools": [{"name": "x"}]}, "tools.0.input_schema: is missing"),
        (ASK | {"tool_choice": {"type": "any"}}, "tool_choice: asks for a call"),
        (ASK | {"stop_sequences": [""]}, "stop_sequences"),
        (ASK | {"thinking": {"type": "enabled"}}, "thinking.budget_tokens: is missing"),
        (said(type="redacted_thinking", data="x"), "messages.0.content.0: redacted thinking"),
        (said(type="thinking", thinking="x"), "messages.0.content.0: thinking belongs to the assistant"),
        (said(type="image", source={"type": "file", "file_id": "f"}), "messages.0.content.0.source"),
        (said(type="document", source={"type": "base64", "media_type": "application/pdf", "data": "x"}), "PDF files"),
        (said(type="document", source={"type": "text", "data": "x"}, citations={"enabled": True}), "citations"),
        (said(type="text", text="x", note="y"), "messages.0.content.0.note"),
        (said(type="text", text=7), "messages.0.content.0.text: must be a string"),
        (said(type="tool_result"), "tool_use_id: is missing"),
        (
            ASK | {"messages": [{"role": "user", "content": LATE}]},
            "must come before",
        ),
        (ASK | {"messages": [{"role": "assistant", "content": [PICTURE]}]}, "messages.0.content.0"),
        (b"[1]", "the body: must be an object"),
        (b'{"model": "m"', "not usable JSON"),
        (b"[" * 100_000, "not usable JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_by_its_place(played, body: Any, where: str) -> None:
    translation = anthropic.make(played.facts("messages"))
    assert translation is not None
    with pytest.raises(Fault) as caught:
        played.run(translation, body, played.unasked)
    assert caught.value.status == 400
    assert where in caught.value.message


def test_an_engine_that_does_not_chat_answers_no_messages(played) -> None:
    assert anthropic.make(played.facts("messages", serves=frozenset({"embeddings"}))) is None
    assert anthropic.make_count(played.facts("count-tokens", serves=frozenset({"chat"}))) is None


# --- answers ----------------------------------------------------------------------------------------------------------


def answered(played, chat: dict[str, Any], usage: Usage, body: dict[str, Any] = ASK, **facts: Any) -> dict[str, Any]:
    """The message that a whole chat answer becomes."""
    translation = anthropic.make(played.facts("messages", **facts))
    assert translation is not None
    played.run(translation, body, played.unasked)
    return json.loads(translation.answer(json.dumps(chat).encode(), usage))


def chat_answer(finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}]}


@pytest.mark.parametrize(
    ("finish", "reason"),
    [("stop", "end_turn"), ("length", "max_tokens"), ("tool_calls", "tool_use"), ("content_filter", "refusal")],
)
def test_the_reason_of_an_end_has_anthropics_word(played, finish: str, reason: str) -> None:
    assert answered(played, chat_answer(finish, content="x"), Usage(5, 50, 2, True))["stop_reason"] == reason


def test_a_context_that_is_full_is_not_called_a_limit_that_was_reached(played) -> None:
    made = answered(played, chat_answer("length", content="x"), Usage(90, 10, 0, True), context=100)
    assert made["stop_reason"] == "model_context_window_exceeded"


def test_the_stop_sequence_that_was_met_is_named(played) -> None:
    body = ASK | {"stop_sequences": ["END"]}
    llamacpp = chat_answer(content="x") | {"__verbose": {"stopping_word": "END", "prompt": "…"}}
    vllm = chat_answer(content="x")
    vllm["choices"][0]["stop_reason"] = "END"
    for chat in (llamacpp, vllm):
        made = answered(played, chat, Usage(), body)
        assert (made["stop_reason"], made["stop_sequence"]) == ("stop_sequence", "END")


def test_what_the_cache_had_is_counted_apart(played) -> None:
    usage = answered(played, chat_answer(content="x"), Usage(12, 3, 8, True))["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (4, 8, 3)


def test_a_given_beginning_is_not_said_twice(played) -> None:
    body = ASK | {"messages": [*ASK["messages"], {"role": "assistant", "content": "The sea"}]}
    made = answered(played, chat_answer(content="The sea is wide"), Usage(), body)
    assert made["content"][0]["text"] == " is wide"


def test_thinking_that_shall_stay_hidden_leaves_its_signature_only(played) -> None:
    body = ASK | {"thinking": {"type": "adaptive", "display": "omitted"}}
    shown, hidden = (
        answered(played, chat_answer(content="x", reasoning_content="why"), Usage(), b) for b in (ASK, body)
    )
    assert shown["content"][0]["thinking"] == "why"
    assert hidden["content"][0]["thinking"] == ""
    assert hidden["content"][0]["signature"] == shown["content"][0]["signature"]


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"choices":[]}', b'{"choices":[{"message":7}]}'])
def test_an_answer_that_is_none_is_the_engines_fault(played, raw: bytes) -> None:
    translation = anthropic.make(played.facts("messages"))
    assert translation is not None
    played.run(translation, ASK, played.unasked)
    with pytest.raises(Fault) as caught:
        translation.answer(raw, Usage())
    assert (caught.value.status, caught.value.source) == (502, "engine")


# --- streams ----------------------------------------------------------------------------------------------------------

TEXTS = st.lists(WORDS, max_size=4)
CALLS = st.lists(st.tuples(WORDS, st.lists(WORDS, max_size=3)), max_size=2)


def deltas(thoughts: list[str], texts: list[str], calls: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"role": "assistant", "content": None}]
    made += [{"reasoning_content": t} for t in thoughts] + [{"content": t} for t in texts]
    for index, (name, pieces) in enumerate(calls):
        begin = {"index": index, "id": f"c{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        made.append({"tool_calls": [begin]})
        made += [{"tool_calls": [{"index": index, "function": {"arguments": p}}]} for p in pieces]
    return made


def collected(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream adds up to; every event must be where it may be."""
    assert [e["type"] for e in events[:2]] == ["message_start", "ping"]
    assert [e["type"] for e in events[-2:]] == ["message_delta", "message_stop"]
    message = events[0]["message"]
    open_block: dict[str, Any] | None = None
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert open_block is None
            assert event["index"] == len(message["content"])
            open_block = event["content_block"] | {"json": ""}
        elif event["type"] == "content_block_stop":
            assert open_block is not None
            given = open_block.pop("json")
            if open_block["type"] == "tool_use":
                open_block["input"] = given
            message["content"].append(open_block)
            open_block = None
        elif event["type"] == "content_block_delta":
            assert open_block is not None
            delta = event["delta"]
            member = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}.get(
                delta["type"], "json"
            )
            open_block[member] += delta["partial_json" if member == "json" else member]
        else:
            assert event["type"] == "ping"
    assert open_block is None
    message |= events[-2]["delta"]
    message["usage"] |= events[-2]["usage"]
    return message


@settings(max_examples=150, deadline=None)
@given(thoughts=TEXTS, texts=TEXTS, calls=CALLS, cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_a_stream_cut_anywhere_adds_up_to_the_whole_answer(played, thoughts, texts, calls, cuts) -> None:
    usage, finish = Usage(12, 3, 8, True), "tool_calls" if calls else "stop"
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {}}], "prompt_progress": {"total": 12, "cache": 8, "processed": n}}
        for n in (8, 12)
    ]
    chunks += [{"choices": [{"index": 0, "delta": d}]} for d in deltas(thoughts, texts, calls)]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}]
    chunks += [{"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}]
    translation = anthropic.make(played.facts("messages"))
    assert translation is not None
    played.run(translation, ASK | {"stream": True}, played.unasked)
    raw = b"".join(translation.events(p) for p in played.pieces(played.sse(chunks), cuts)) + translation.end(usage)
    streamed = collected(played.events(raw))

    tool_calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": n, "arguments": "".join(p)}}
        for i, (n, p) in enumerate(calls)
    ]
    whole = answered(
        played,
        chat_answer(finish, content="".join(texts), reasoning_content="".join(thoughts), tool_calls=tool_calls or None),
        usage,
    )
    said = ["".join(p) for _, p in calls]
    for block in whole["content"]:  # a stream passes arguments on as they come, a whole answer holds them decoded
        if block["type"] == "tool_use":
            block["input"] = said.pop(0)
    if not thoughts and not texts and not calls:
        whole["content"] = []
    assert streamed == whole


def test_the_prompts_size_is_told_before_the_first_token(played) -> None:
    translation = anthropic.make(played.facts("messages"))
    assert translation is not None
    played.run(translation, ASK | {"stream": True}, played.unasked)
    first = {"choices": [{"index": 0, "delta": {}}], "prompt_progress": {"total": 12, "cache": 8, "processed": 8}}
    start = played.events(translation.events(b"data: " + json.dumps(first).encode() + b"\n\n"))[0]
    assert start["message"]["usage"]["input_tokens"] == 4
    assert start["message"]["usage"]["cache_read_input_tokens"] == 8


def test_a_failure_in_the_middle_of_a_stream_is_a_fault(played) -> None:
    translation = anthropic.make(played.facts("messages"))
    assert translation is not None
    played.run(translation, ASK | {"stream": True}, played.unasked)
    with pytest.raises(Fault, match="out of memory") as caught:
        translation.events(b'data: {"error": {"code": 500, "message": "out of memory"}}\n\n')
    assert caught.value.status == 500


# --- count_tokens -----------------------------------------------------------------------------------------------------


def test_tokens_are_counted_by_the_engines_own_template_and_tokenizer(played) -> None:
    asks: list[tuple[str, Any]] = []

    def engine(call: Any) -> bytes:
        asks.append((call.operation, json.loads(call.body)))
        return b'{"prompt": "<hi>"}' if call.operation == "llamacpp-template" else b'{"tokens": [1, 2, 3]}'

    translation = anthropic.make_count(played.facts("count-tokens", call_prefix="<call>"))
    assert translation is not None
    body = {"model": "m", "messages": ASK["messages"], "tools": [TOOL], "tool_choice": {"type": "any"}}
    assert json.loads(played.run(translation, body, engine).body) == {"input_tokens": 3}
    assert asks[0][1]["messages"][-1] == {
        "role": "assistant",
        "content": "<call>",
    }  # as the message itself would have it
    assert asks[1] == ("llamacpp-tokenize", {"content": "<hi>", "add_special": True, "parse_special": True})


def test_images_are_not_counted_as_if_they_were_nothing(played) -> None:
    translation = anthropic.make_count(played.facts("count-tokens"))
    assert translation is not None
    with pytest.raises(Fault, match="images"):
        played.run(translation, {"model": "m", "messages": [{"role": "user", "content": [PICTURE]}]}, played.unasked)


@pytest.mark.parametrize("said", [b"", b"null", b"{}", b'{"prompt":7}', b'{"prompt":"x","tokens":null}'])
def test_an_engine_that_counts_nonsense_is_a_502(played, said: bytes) -> None:
    translation = anthropic.make_count(played.facts("count-tokens"))
    assert translation is not None
    with pytest.raises(Fault) as refused:
        played.run(translation, {"model": "m", "messages": [{"role": "user", "content": "hi"}]}, lambda _: said)
    assert refused.value.status == 502
