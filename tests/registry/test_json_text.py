"""Changing one member of a JSON text leaves every other byte as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.registry.jsontext import drop, put

DOCKER = """{
\t"auths": {
\t\t"https://index.docker.io/v1/": {
\t\t\t"auth": "bWU6cGE="
\t\t}
\t},
\t"HttpHeaders": {"X-Odd":   "\\u00e9"},
\t"detachKeys": "ctrl-e,e",
\t"number": 1.50
}
"""


def test_a_login_is_added_in_the_files_own_style() -> None:
    text = put(DOCKER, ("auths", "ghcr.io"), {"auth": "eDp5"})
    added = '\t\t},\n\t\t"ghcr.io": {\n\t\t\t"auth": "eDp5"\n\t\t}\n\t},'
    assert text == DOCKER.replace("\t\t}\n\t},", added)
    assert drop(text, ("auths", "ghcr.io")) == DOCKER


def test_the_missing_parts_are_made() -> None:
    assert json.loads(put("", ("auths", "x"), {"auth": "y"})) == {"auths": {"x": {"auth": "y"}}}
    assert json.loads(put('{"auths": null}', ("auths", "x"), {})) == {"auths": {"x": {}}}
    assert put('{"a":1}', ("b",), 2) == '{"a":1,"b": 2}'


def test_what_is_not_there_need_not_be_removed() -> None:
    assert drop(DOCKER, ("auths", "nowhere")) == DOCKER
    assert drop("{}", ("auths", "nowhere")) == "{}"


@pytest.mark.parametrize("text", ["[]", '{"a"', '{"a": 1,}', '{"a": 1 "b": 2}', "{1: 2}", "nothing"])
def test_damaged_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        put(text, ("a", "b"), 1)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
_documents = st.dictionaries(st.sampled_from(["auths", "x", "é", ""]), _values, max_size=4)


@given(_documents, st.sampled_from([None, 2, "\t"]), st.sampled_from(["auths", "x", "é", ""]), _values)
def test_any_object_ends_as_if_it_had_been_read_changed_and_written(
    document: dict[str, Any], indent: Any, key: str, value: Any
) -> None:
    text = json.dumps(document, indent=indent)
    assert json.loads(put(text, (key,), value)) == {**document, key: value}
    inner = document.get(key)
    changed = {**inner, "host": value} if isinstance(inner, dict) else {"host": value}
    assert json.loads(put(text, (key, "host"), value)) == {**document, key: changed}
    assert json.loads(drop(text, (key,))) == {k: v for k, v in document.items() if k != key}
    assert list(json.loads(put(text, (key,), value)))[: len(document)] == list(document), "order is kept"
