"""What the gateway makes of ``tool_choice`` before an engine sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pierhead.gateway.faults import Fault
from pierhead.gateway.tool_choice import adapt

ASK = [{"role": "user", "content": 'hé \\ " {}'}]


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def made(prefix: str = "", **members: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": ASK, "tools": [tool("a"), tool("b")], "seed": 2**60, **members}
    return json.loads(adapt(json.dumps(body).encode(), prefix))


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_a_named_function_is_the_only_tool_and_is_required_once() -> None:
    found = made(tool_choice=named("b"))
    assert found == {
        "model": "m",
        "messages": ASK,
        "tools": [tool("b")],
        "seed": 2**60,
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_leave_those_and_keep_their_mode(mode: str) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named("a")]}}
    found = made(tool_choice=choice)
    assert (found["tools"], found["tool_choice"]) == ([tool("a")], mode)


def test_a_required_call_begins_with_the_prefix_of_an_engine_that_needs_one() -> None:
    found = made("<call>", tool_choice="required")
    assert found["messages"] == [*ASK, {"role": "assistant", "content": "<call>"}]
    assert found["parallel_tool_calls"] is False
    assert made("<call>", tool_choice="required", parallel_tool_calls=True)["parallel_tool_calls"] is True
    assert made("<call>", tool_choice=named("a"))["messages"][-1]["content"] == "<call>"


@pytest.mark.parametrize(
    "members",
    [
        {"tool_choice": "auto"},
        {"tool_choice": "none"},
        {},
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        {"tool_choice": "required", "messages": [*ASK, {"role": "assistant", "content": "So"}]},
    ],
)
def test_where_nothing_is_forced_nothing_is_put_into_the_answer(members: dict[str, Any]) -> None:
    wanted = members.get("messages", ASK)
    assert made("<call>", **members)["messages"] == wanted


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"tool_choice": named("c")}, "'c'"),
        ({"tool_choice": named("a"), "tools": []}, "'a'"),
        ({"tool_choice": "required", "tools": []}, "no 'tools'"),
        ({"tool_choice": {"type": "custom"}}, "must be"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}}, "no tool"),
    ],
)
def test_a_choice_that_cannot_be_kept_is_refused(members: dict[str, Any], said: str) -> None:
    with pytest.raises(Fault, match=said) as caught:
        made(**members)
    assert (caught.value.status, caught.value.param) == (400, "tool_choice")


@pytest.mark.parametrize(
    "body",
    [
        b'{"tool_choice": 7, "messages": []}',
        b'{"tool_choice": "required", "messages": 5, "tools": [1]}',
        b'{"tool_choice": {"type": "function", "function": 1}, "messages": [], "tools": 3}',
        b'{"tool_choice": {"type": "function"',
        b'["tool_choice"]',
        b'{"prompt": "x", "tool_choice": "required"}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_such_request_is_left_to_the_engine(body: bytes) -> None:
    assert adapt(body, "<call>") == body
