"""The few members that are changed on the way: nothing that a client spells oddly takes a bound off its answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pierhead.gateway import passthrough
from pierhead.gateway.ask import read_ask


def changed(body: bytes, *pieces: bytes, cap: int = 9) -> dict[str, Any]:
    """What an engine reads, which minds the last of members given twice."""
    ask = read_ask(body)
    return json.loads(b"".join(passthrough.apply(pieces or (body,), *passthrough.changes("chat", ask, "", cap, body))))


@pytest.mark.parametrize("member", [b'"max_tokens":null', b'"max\\u005ftokens": null'])
def test_a_bound_of_null_does_not_undo_the_one_that_is_put_in(member: bytes) -> None:
    assert changed(b'{"model":"m",%b}' % member)["max_tokens"] == 9


def test_options_of_null_do_not_undo_the_wish_for_the_usage() -> None:
    found = changed(b'{"model":"m","stream":true,"stream_options":null}')
    assert found["stream_options"] == {"include_usage": True}
    assert found["max_tokens"] == 9


def test_the_other_options_of_a_stream_stay() -> None:
    found = changed(b'{"model":"m","stream":true,"stream_options":{"include_obfuscation":false,"include_usage":false}}')
    assert found["stream_options"] == {"include_obfuscation": False, "include_usage": True}


def test_a_piece_of_nothing_but_space_takes_no_bound_off() -> None:
    body = b'{"model":"m","stream":true}'
    assert changed(body, b" " * 5000, body)["max_tokens"] == 9
    assert changed(body, b" " * 5000, body)["stream_options"] == {"include_usage": True}
