"""What a request can take is bounded before it is sent, however a client hides it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pierhead.config import TrafficSettings
from pierhead.gateway import passthrough
from pierhead.gateway.ask import read_ask
from pierhead.gateway.budgets import Budgets
from pierhead.gateway.holder import Holder
from pierhead.gateway.lanes import Lane
from pierhead.gateway.ledger import MemoryLedger
from pierhead.gateway.link import Endpoint, Grants, Key, Route
from pierhead.gateway.operations import OPERATIONS
from pierhead.gateway.plan import MARGIN, Plan, plan
from pierhead.gateway.routes import Entry
from pierhead.gateway.scrape import relabel
from pierhead.gateway.unseen import PICTURE, WHOLE
from pierhead.gateway.upstream import Target
from pierhead.gateway.usage import tokens
from pierhead.routing.balance import Sessions


def planned(operation: str, body: dict[str, Any] | bytes, context: int = 0) -> Plan:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    targets = (Target(Endpoint(replica="r", socket="/nowhere", context=context)),)
    entry = Entry(Route(name="m"), targets, Lane("m", TrafficSettings()), None)
    room = Budgets(MemoryLedger())
    return plan(room, read_ask(text), entry, len(text), OPERATIONS[operation], None, text)


def test_a_prompt_takes_no_more_than_its_bytes_and_the_context() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 1000}]}
    assert planned("chat", body).prompt == len(json.dumps(body)) + MARGIN
    assert planned("chat", body, context=512).prompt == 512


def test_texts_to_embed_each_have_a_context_of_their_own() -> None:
    body = {"model": "m", "input": ["word " * 400] * 100}
    assert planned("embeddings", body, context=512).prompt >= 100 * 400
    assert planned("ollama-embed", body, context=512).prompt >= 100 * 400


@pytest.mark.parametrize(
    ("operation", "query", "documents"), [("rerank", "query", "documents"), ("score", "text_1", "text_2")]
)
def test_a_query_is_read_again_with_every_document(operation: str, query: str, documents: str) -> None:
    body = {"model": "m", query: "word " * 100, documents: ["a"] * 100}
    assert planned(operation, body).prompt >= 100 * 100
    assert planned(operation, body, context=256).prompt >= 100 * 100


def test_prompts_that_are_objects_have_answers_of_their_own() -> None:
    body = {"model": "m", "max_tokens": 10, "prompt": [{"prompt_string": "a"}] * 5}
    assert planned("completions", body).answers == 5


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        ("responses", {"previous_response_id": "resp_1", "input": "go on"}),
        ("responses", {"conversation": "conv_1", "input": "go on"}),
        ("responses", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
        ("ollama-generate", {"prompt": "go on", "context": [1, 2, 3]}),
        (
            "messages",
            {"messages": [{"content": [{"type": "document", "source": {"type": "url", "url": "https://x"}}]}]},
        ),
        ("messages", {"messages": [], "tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        ("chat", {"messages": [{"content": [{"type": "file", "file": {"file_id": "file-1"}}]}]}),
        ("chat", {"messages": [{"content": [{"type": "video_url", "video_url": {"url": "https://x"}}]}]}),
    ],
)
def test_what_is_kept_elsewhere_counts_as_a_whole_context(operation: str, body: dict[str, Any]) -> None:
    assert planned(operation, {"model": "m", **body}).prompt >= WHOLE
    assert planned(operation, {"model": "m", **body}, context=4096).prompt == 4096


@pytest.mark.parametrize(
    ("operation", "body", "pictures"),
    [
        ("chat", {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "https://x"}}] * 3}]}, 3),
        ("messages", {"messages": [{"content": [{"type": "image", "source": {"type": "url", "url": "u"}}] * 2}]}, 2),
        ("responses", {"input": [{"content": [{"type": "input_image", "image_url": "https://x"}]}]}, 1),
        ("ollama-chat", {"messages": [{"role": "user", "images": ["aaaa", "bbbb", "cccc"]}]}, 3),
        ("ollama-generate", {"prompt": "x", "images": ["aaaa", "bbbb"]}, 2),
    ],
)
def test_a_picture_counts_as_much_as_the_largest_one(operation: str, body: dict[str, Any], pictures: int) -> None:
    assert planned(operation, {"model": "m", **body}).prompt >= pictures * PICTURE
    assert planned(operation, {"model": "m", **body}, context=4096).prompt == 4096
    hidden = json.dumps({"model": "m", **body}).replace("image", "im\\u0061ge").encode()
    assert planned(operation, hidden).prompt >= pictures * PICTURE


def test_talk_about_pictures_and_other_languages_count_as_nothing_more() -> None:
    talk = 'an "image" or "image_url", a "file_id", grüße, 図'
    body = {"model": "m", "messages": [{"role": "user", "content": talk}], "tools": [{"name": "web_search"}]}
    assert planned("chat", body).prompt == len(json.dumps(body)) + MARGIN


def test_numbers_without_end_are_a_bound_that_nobody_can_afford() -> None:
    made = planned("chat", b'{"model":"m","max_tokens":%b,"n":%b}' % (b"9" * 4000, b"9" * 4000))
    assert 10**15 < made.least <= made.tokens < 10**60
    assert str(made.tokens)


@pytest.mark.parametrize("name", ["max_tokens", "max_\\u0074okens"])
def test_a_limit_given_as_null_does_not_undo_the_gateways_own(name: str) -> None:
    body = b'{"model":"m","stream":true,"%b":null,"stream_options":null,"stream_opti\\u006fns":null}' % name.encode()
    ask = read_ask(body)
    made = b"".join(passthrough.apply([body], *passthrough.changes("chat", ask, "", 10, body)))
    pairs = json.loads(made, object_pairs_hook=list)
    assert [value for member, value in pairs if member == "max_tokens"] == [10]
    assert [dict(value) for member, value in pairs if member == "stream_options"] == [{"include_usage": True}]


def test_an_engine_that_lies_about_its_usage_breaks_no_account() -> None:
    for text in (
        b'{"usage":{"prompt_tokens":%b,"completion_tokens":%b}}',
        b'{"timings":{"prompt_n":%b,"predicted_n":%b}}',
    ):
        told = tokens(text % (b"9" * 300, b"9" * 300))
        assert 0 <= told.prompt + told.completion < 1 << 40
        told = tokens(text % (b"-5", b"-7"))
        assert told.prompt == told.completion == 0


def test_what_a_client_is_recognised_by_takes_little_memory() -> None:
    sessions = Sessions()
    long = "x" * 60000
    assert sessions.place(long, ["a", "b"]) == sessions.place(long, ["a", "b"])
    assert all(len(name) < 300 for name in sessions._kept)


def test_an_engine_with_very_many_metrics_is_heard_in_part() -> None:
    assert len(list(relabel("a 1\n" * 250_000, "m", "r"))) == 20_000
    assert not list(relabel("a{} " + "1" * 100_000 + '\nb{a="' + "x" * 100_000 + '"} 1', "m", "r"))


def test_a_name_that_moved_to_another_model_takes_the_permission_with_it() -> None:
    holder = Holder(Key(id="oidc:ann", mac="", grants=Grants(models=("prod",))))
    assert holder.sees("old", ("prod",))
    assert not holder.sees("new")
    assert not holder.sees("old", ())
    assert holder.sees("new", ("prod",))
