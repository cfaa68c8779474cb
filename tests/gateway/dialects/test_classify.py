"""Classification for an engine that has it at a path of its own."""

from __future__ import annotations

import pytest
from tests.gateway.dialects.test_ranking_tokens import facts

from pierhead.gateway.dialects import classify
from pierhead.gateway.dialects.base import Send
from pierhead.gateway.operations import OPERATIONS, PATHS
from pierhead.gateway.usage import Usage


def test_bodies_pass_as_they_are() -> None:
    translation = classify.make(facts("classify", "vllm-classify"))
    assert translation is not None
    with pytest.raises(StopIteration) as done:
        next(translation.steps(b'{"model":"m","input":"a"}'))
    assert done.value.value == Send("vllm-classify", b'{"model":"m","input":"a"}')
    assert translation.answer(b"{}", Usage()) == b"{}"


def test_an_engine_without_it_has_no_translation_and_clients_cannot_ask_for_it() -> None:
    assert classify.make(facts("classify", "chat")) is None
    assert OPERATIONS["vllm-classify"].path == "/classify"
    assert PATHS["/classify"].name == "classify"
