"""Ollama's chats and prompts as an OpenAI engine gets them, and what its clients get back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.gateway.ask import Ask
from pierhead.gateway.dialects.base import Call, Facts, Keep, Reply, Send
from pierhead.gateway.dialects.ollama_context import Said, packed, unpacked
from pierhead.gateway.dialects.ollama_request import seconds
from pierhead.gateway.dialects.ollama_text import make, unload
from pierhead.gateway.faults import Fault
from pierhead.gateway.operations import OPERATIONS
from pierhead.gateway.sse import EventSplitter
from pierhead.gateway.usage import Usage

LLAMACPP = frozenset({"chat", "completions", "embeddings", "llamacpp-props", "llamacpp-infill"})
USED = Usage(12, 3, 0, True)
TIMINGS = {"prompt_ms": 20.5, "predicted_ms": 100.0, "prompt_n": 12, "predicted_n": 3}


def facts(operation: str = "ollama-chat", **changes: Any) -> Facts:
    ticks = iter(range(1, 100_000))
    known: dict[str, Any] = {
        "operation": OPERATIONS[operation],
        "ask": Ask(model="m"),
        "model": "m",
        "id": "req_1",
        "created": 1_700_000_000,
        "serves": LLAMACPP,
        "context": 4096,
        "started": 1.0,
        "clock": lambda: 1.0 + next(ticks) / 1000,
    }
    return Facts(**{**known, **changes})


def sent(body: dict[str, Any], about: Facts | None = None) -> tuple[Any, Send | Reply, list[Call | Keep]]:
    """The translation, what it does last, and what it asked for before."""
    translation = make(about or facts())
    assert translation is not None
    steps = translation.steps(json.dumps({"model": "m", **body}).encode())
    asked: list[Any] = []
    try:
        while True:
            asked.append(next(steps))
    except StopIteration as stop:
        return translation, stop.value, asked


def chat(*messages: dict[str, Any], about: Facts | None = None, **body: Any) -> dict[str, Any]:
    """The request that the engine gets for a chat."""
    _, send, _ = sent({"messages": list(messages) or [{"role": "user", "content": "hi"}], **body}, about)
    assert isinstance(send, Send)
    assert send.operation == "chat"
    return json.loads(send.body)


def generate(about: Facts | None = None, **body: Any) -> tuple[Any, Send | Reply, list[Any]]:
    return sent({"prompt": "hi", **body}, about or facts("ollama-generate"))


def events(*objects: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(o).encode() + b"\n\n" for o in objects) + b"data: [DONE]\n\n"


def delta(**members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": members, "finish_reason": None}]}


def end(reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


LAST = {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}, "timings": TIMINGS}


def lines(translation: Any, stream: bytes) -> list[dict[str, Any]]:
    data = translation.events(stream) + translation.end(USED)
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


# --- the request ------------------------------------------------------------------------------------------------------


def test_a_chat_streams_unless_told_not_to_and_asks_for_its_usage() -> None:
    assert chat()["stream"] is True
    assert chat()["stream_options"] == {"include_usage": True}
    assert "stream" not in chat(stream=False)


def test_options_get_the_engines_names() -> None:
    made = chat(
        options={"num_predict": 5, "temperature": 0, "repeat_penalty": 1.1, "stop": ["x"], "seed": 7, "num_keep": 4}
    )
    assert made["max_tokens"] == 5
    assert made["temperature"] == 0
    assert made["repeat_penalty"] == 1.1
    assert made["stop"] == ["x"]
    assert made["seed"] == 7
    assert made["n_keep"] == 4


def test_no_end_and_any_seed_are_not_told_the_engine() -> None:
    made = chat(options={"num_predict": -1, "seed": -1})
    assert "max_tokens" not in made
    assert "seed" not in made


@pytest.mark.parametrize(("wish", "cap", "most"), [(None, 8, 8), (-1, 8, 8), (4, 8, 4), (100, 8, 8)])
def test_a_keys_bound_holds_whatever_the_client_wishes(wish: int | None, cap: int, most: int) -> None:
    options = {} if wish is None else {"num_predict": wish}
    assert chat(options=options, about=facts(cap=cap))["max_tokens"] == most


def test_what_only_says_how_the_machine_works_changes_no_request() -> None:
    made = chat(options={"num_ctx": 2048, "num_gpu": 1, "num_thread": 4})
    assert not made.keys() & {"num_ctx", "num_gpu", "num_thread"}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"options": {"num_ctx": 100_000}}, "--context 100000"),
        ({"options": {"temprature": 1}}, "Did you mean 'temperature'"),
        ({"options": {"top_k": "many"}}, "must be a number"),
        ({"options": {"stop": [1]}}, "list of strings"),
        ({"format": "yaml"}, "JSON schema"),
        ({"keep_alive": "soon"}, "not a duration"),
        ({"think": "hard"}, "think must be"),
        ({"messages": [{"role": "king", "content": ""}]}, "no role 'king'"),
        ({"messages": [{"role": "user", "content": "x", "images": ["%%"]}]}, "not base64"),
        ({"messages": "hi"}, "messages"),
        ({"top_logprobs": 21}, "between 0 and 20"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_words(body: dict[str, Any], word: str) -> None:
    with pytest.raises(Fault) as caught:
        sent({"messages": [{"role": "user", "content": "hi"}], **body})
    assert caught.value.status == 400
    assert word in caught.value.message


def test_an_engine_that_is_not_llamacpps_gets_only_words_that_it_knows() -> None:
    other = frozenset({"chat", "completions"})
    made = chat(options={"repeat_penalty": 1.2, "top_k": 3}, about=facts(serves=other))
    assert made["repetition_penalty"] == 1.2
    with pytest.raises(Fault, match="no option 'mirostat'"):
        chat(options={"mirostat": 1}, about=facts(serves=other))


def test_a_schema_and_the_word_json_shape_the_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert chat(format=schema)["response_format"]["json_schema"]["schema"] == schema
    assert chat(format="json")["response_format"] == {"type": "json_object"}
    assert "response_format" not in chat(format="")


def test_thinking_is_turned_on_off_and_up() -> None:
    assert chat(think=False)["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat(think="high")["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "high"}
    with pytest.raises(Fault, match="does not support thinking"):
        chat(think=True, about=facts(card={"capabilities": ["chat"]}))


def test_calls_and_their_results_get_ids_that_fit() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    made = chat(
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "tool_calls": [call, {"function": {"name": "sub", "arguments": {}}}]},
        {"role": "tool", "tool_name": "sub", "content": "0"},
        {"role": "tool", "content": "2"},
    )["messages"]
    calls = made[1]["tool_calls"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"a": 1}
    assert made[2]["tool_call_id"] == calls[1]["id"]
    assert made[3]["tool_call_id"] == calls[0]["id"]


def test_images_become_parts_with_their_kind() -> None:
    made = chat({"role": "user", "content": "what?", "images": ["/9j/AAAA"]})
    text, image = made["messages"][0]["content"]
    assert text == {"type": "text", "text": "what?"}
    assert image["image_url"]["url"] == "data:image/jpeg;base64,/9j/AAAA"
    with pytest.raises(Fault, match="does not support images"):
        chat({"role": "user", "images": ["/9j/AAAA"]}, about=facts(card={"capabilities": ["chat"]}))


# --- loading and unloading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("0", 0), (0, 0), (-1, -1), ("-1m", -1), ("100ms", 0.1), (60, 60)],
)
def test_durations_are_read_as_ollama_writes_them(text: Any, wanted: float) -> None:
    assert seconds(text) == pytest.approx(wanted)


def test_an_empty_request_only_loads_and_says_for_how_long() -> None:
    _, reply, asked = sent({"messages": [], "keep_alive": "10m"})
    assert isinstance(reply, Reply)
    assert asked == [Keep(600.0)]
    said = json.loads(reply.body)
    assert said["done_reason"] == "load"
    assert said["done"] is True
    _, reply, _ = generate(prompt="")
    assert isinstance(reply, Reply)
    assert json.loads(reply.body)["response"] == ""


def test_a_request_to_unload_is_answered_before_anything_starts() -> None:
    found = unload(b'{"model":"m","keep_alive":0}', facts("ollama-generate"))
    assert found is not None
    assert found[0] == Keep(0.0)
    assert json.loads(found[1].body)["done_reason"] == "unload"
    assert unload(b'{"model":"m","keep_alive":0,"prompt":"hi"}', facts("ollama-generate")) is None
    assert unload(b'{"model":"m","keep_alive":"5m"}', facts()) is None


# --- generate ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_asked_as_a_chat_with_its_system_message() -> None:
    _, send, _ = generate(system="Be brief.", options={"num_predict": 3})
    assert isinstance(send, Send)
    made = json.loads(send.body)
    assert made["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert send.stream


def test_a_conversation_goes_on_from_the_numbers_of_the_answer_before() -> None:
    first, _, _ = generate(system="Be brief.")
    context = lines(first, events(delta(content="hel"), delta(content="lo"), end(), LAST))[-1]["context"]
    assert all(isinstance(n, int) for n in context)
    _, send, _ = generate(prompt="again", context=context)
    assert isinstance(send, Send)
    assert [(m["role"], m["content"]) for m in json.loads(send.body)["messages"]] == [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "again"),
    ]


@pytest.mark.parametrize("numbers", [[1, 2, 3], [0x50494552, 5, 1 << 30], [0x50494552, -1, 3], [0x50494552, 3, 7]])
def test_numbers_of_somebody_else_are_refused(numbers: list[int]) -> None:
    with pytest.raises(Fault, match="was not made here"):
        generate(context=numbers)


@given(st.lists(st.builds(Said, st.sampled_from(["user", "assistant", "system"]), st.text(max_size=200)), max_size=5))
def test_a_conversation_is_the_same_after_a_journey_as_numbers(said: list[Said]) -> None:
    assert unpacked(packed(said)) == said


def test_raw_prompts_go_as_they_are_and_have_no_context() -> None:
    translation, send, _ = generate(raw=True, format={"type": "object"})
    assert isinstance(send, Send)
    assert send.operation == "completions"
    made = json.loads(send.body)
    assert made["prompt"] == "hi"
    assert made["json_schema"] == {"type": "object"}
    text = [
        {"choices": [{"text": "ho", "finish_reason": None}]},
        {"choices": [{"text": "", "finish_reason": "length"}]},
    ]
    said = lines(translation, events(*text, LAST))
    assert [line["response"] for line in said] == ["ho", ""]
    assert said[-1]["done_reason"] == "length"
    assert "context" not in said[-1]


def test_text_to_fill_in_goes_to_llamacpps_own_endpoint() -> None:
    translation, send, _ = generate(prompt="def a(", suffix="return", options={"num_predict": 4})
    assert isinstance(send, Send)
    assert send.operation == "llamacpp-infill"
    made = json.loads(send.body)
    assert (made["input_prefix"], made["input_suffix"], made["n_predict"]) == ("def a(", "return", 4)
    own = [{"content": "x", "stop": False}, {"content": "", "stop": True, "stop_type": "limit", "timings": TIMINGS}]
    said = lines(translation, events(*own))
    assert said[0]["response"] == "x"
    assert said[-1]["done_reason"] == "length"
    with pytest.raises(Fault, match="does not support insert"):
        generate(facts("ollama-generate", serves=frozenset({"chat"})), suffix="x")


def test_a_template_of_the_request_is_refused_but_the_one_that_means_none() -> None:
    with pytest.raises(Fault, match="a template cannot be given"):
        generate(template="{{ .System }} {{ .Prompt }}")
    _, send, _ = generate(template="{{ .Prompt }}")
    assert isinstance(send, Send)
    assert send.operation == "completions"
    with pytest.raises(Fault, match="raw mode does not support"):
        generate(raw=True, system="x")


# --- the answer -------------------------------------------------------------------------------------------------------


def test_a_streams_last_record_has_true_counts_and_times() -> None:
    translation, _, _ = sent({"messages": [{"role": "user", "content": "hi"}]})
    said = lines(translation, events(delta(role="assistant", content=None), delta(content="Hé"), end(), LAST))
    assert [line["done"] for line in said] == [False, True]
    assert said[0]["message"] == {"role": "assistant", "content": "Hé"}
    assert said[0]["created_at"].startswith("2023-11-14T22:13:20.")
    last = said[-1]
    assert last["done_reason"] == "stop"
    assert last["prompt_eval_count"] == 12
    assert last["eval_count"] == 3
    assert last["prompt_eval_duration"] == 20_500_000
    assert last["eval_duration"] == 100_000_000
    assert 0 < last["load_duration"] < last["total_duration"]


def test_an_engine_that_tells_no_times_is_timed_here() -> None:
    translation, _, _ = sent({"messages": [{"role": "user", "content": "hi"}]})
    usage = {"choices": [], "usage": LAST["usage"]}
    last = lines(translation, events(delta(content="a"), delta(content="b"), end(), usage))[-1]
    assert last["prompt_eval_duration"] > 0
    assert last["eval_duration"] > 0


def test_thoughts_calls_and_probabilities_have_their_places() -> None:
    translation, _, _ = sent({"messages": [{"role": "user", "content": "hi"}]})
    part = {"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a":'}}
    token = {"id": 5, "token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.0}]}
    told = {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [token]}}]}
    said = lines(
        translation,
        events(
            delta(reasoning_content="hm"),
            told,
            delta(tool_calls=[part]),
            delta(tool_calls=[{"index": 0, "function": {"arguments": "1}"}}]),
            end("tool_calls"),
            LAST,
        ),
    )
    assert said[0]["message"]["thinking"] == "hm"
    assert said[1]["logprobs"] == [
        {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -1.0}]}
    ]
    call = {"id": "c1", "function": {"index": 0, "name": "add", "arguments": {"a": 1}}}
    assert said[2]["message"]["tool_calls"] == [call]
    assert said[-1]["done_reason"] == "stop"


def test_a_call_that_broke_off_is_told_as_text() -> None:
    translation, _, _ = sent({"messages": [{"role": "user", "content": "hi"}]})
    part = {"index": 0, "function": {"name": "add", "arguments": '{"a":'}}
    said = lines(translation, events(delta(tool_calls=[part]), end("length"), LAST))
    assert said[0]["message"]["content"] == 'add({"a":'


def test_a_whole_answer_is_one_record() -> None:
    translation, send, _ = sent({"messages": [{"role": "user", "content": "hi"}], "stream": False})
    assert isinstance(send, Send)
    assert not send.stream
    message = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "timings": TIMINGS, "usage": LAST["usage"]}
    said = json.loads(translation.answer(json.dumps(body, indent=1).encode(), USED))
    assert said["message"] == {"role": "assistant", "content": "yes", "thinking": "hm"}
    assert said["done"] is True
    assert said["eval_count"] == 3
    with pytest.raises(Fault, match="can be read"):
        translation.answer(b"nonsense", USED)


def test_an_error_in_a_stream_is_one_for_the_client() -> None:
    translation, _, _ = sent({"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(Fault, match="broken"):
        translation.events(events({"error": {"message": "broken", "code": 500}}))


# --- whatever comes ---------------------------------------------------------------------------------------------------

_STREAM = events(
    delta(content="Hé"),
    delta(reasoning_content="…"),
    delta(content="\n\ndata: x"),
    delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": "{}"}}]),
    end(),
    LAST,
)


@given(st.lists(st.integers(1, len(_STREAM) - 1), max_size=12, unique=True))
def test_a_stream_cut_at_any_byte_gives_the_same_records(cuts: list[int]) -> None:
    def told(pieces: list[bytes]) -> list[dict[str, Any]]:
        translation, _, _ = sent({"messages": [{"role": "user", "content": "hi"}]})
        splitter = EventSplitter()
        data = b"".join(translation.events(whole) for piece in pieces if (whole := splitter.feed(piece)))
        data += translation.events(splitter.flush()) + translation.end(USED)
        kept = [json.loads(line) for line in data.splitlines()]
        return [{k: v for k, v in line.items() if k not in ("created_at", "total_duration")} for line in kept]

    at = [0, *sorted(cuts), len(_STREAM)]
    assert told([_STREAM[a:b] for a, b in itertools.pairwise(at)]) == told([_STREAM])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
_MEMBERS = """
messages prompt options format keep_alive think tools images suffix context raw template system stream logprobs
""".split()  # noqa: SIM905
_members = st.sampled_from(_MEMBERS)
_options = st.dictionaries(st.sampled_from(["num_ctx", "top_k", "stop", "seed", "temperature"]), _json, max_size=3)


@given(st.dictionaries(_members, _json | _options, max_size=6), st.sampled_from(["ollama-chat", "ollama-generate"]))
def test_a_hostile_body_is_a_request_or_a_refusal(body: dict[str, Any], operation: str) -> None:
    _check(lambda: sent(body, facts(operation)))


@given(st.binary(max_size=200), st.sampled_from(["ollama-chat", "ollama-generate"]))
def test_bytes_that_are_no_json_are_refused(body: bytes, operation: str) -> None:
    translation = make(facts(operation))
    assert translation is not None
    _check(lambda: next(translation.steps(body)))
    _check(lambda: unload(body, facts(operation)))


@given(st.binary(max_size=300))
def test_an_engines_nonsense_breaks_nothing(data: bytes) -> None:
    translation, _, _ = sent({"messages": [{"role": "user", "content": "hi"}]})
    _check(lambda: translation.events(b"data: " + data + b"\n\n"))
    _check(lambda: translation.answer(data, USED))
    assert translation.end(USED)


def _check(work: Callable[[], Any]) -> None:
    status = 400
    try:
        work()
    except Fault as fault:
        status = fault.status
    except StopIteration:
        pass
    assert 400 <= status < 600
    assert status != 500
