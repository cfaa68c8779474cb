"""Changing one member of a JSON object inside its text, so that everything else stays as somebody wrote it; pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class _Member:
    """Positions of one member: ``lead`` is where the white space before its key begins."""

    key: str
    lead: int
    start: int
    value: int
    end: int


def put(text: str, path: tuple[str, ...], value: Any) -> str:
    """The text with ``value`` at ``path``, whose objects are made where they are missing. ValueError for damaged text.

    Empty text is an empty object.
    """
    text = text if text.strip() else "{}"
    return _put(text, _SPACE.match(text).end(), path, value, 1)  # type: ignore[union-attr]


def drop(text: str, path: tuple[str, ...]) -> str:
    """The text without the member at ``path``; as it was when there is none."""
    at = _SPACE.match(text).end()  # type: ignore[union-attr]
    for depth, key in enumerate(path):
        members, _ = _members(text, at)
        found = [m for m in members if m.key == key]
        if not found:
            return text
        if depth == len(path) - 1:
            return _without(text, at, members, key)
        at = found[-1].value
    return text


def _put(text: str, at: int, path: tuple[str, ...], value: Any, depth: int) -> str:
    members, close = _members(text, at)
    found = [m for m in members if m.key == path[0]]
    inner = path[1:]
    if found and inner and text[found[-1].value] == "{":
        return _put(text, found[-1].value, inner, value, depth + 1)
    for key in reversed(inner):
        value = {key: value}
    indent = text[members[-1].lead : members[-1].start] if members else "\n" + "\t" * depth
    lines = "\n" in indent
    shown = json.dumps(value, indent="\t" if lines else None, ensure_ascii=False).replace("\n", indent)
    if found:
        return text[: found[-1].value] + shown + text[found[-1].end :]
    entry = f"{indent}{json.dumps(path[0])}: {shown}"
    if members:
        return text[: members[-1].end] + "," + entry + text[members[-1].end :]
    outer = "\n" + "\t" * (depth - 1)
    return text[: at + 1] + entry + outer + text[close:]


def _without(text: str, at: int, members: list[_Member], key: str) -> str:
    """Cut every member of that name."""
    kept = [text[m.lead : m.end] for m in members if m.key != key]
    rest = text[members[-1].end :]
    return text[: at + 1] + (",".join(kept) + rest if kept else rest.lstrip(" \t\n\r"))


def _members(text: str, at: int) -> tuple[list[_Member], int]:
    """The members of the object that begins at ``at``, and where its brace closes."""
    if text[at : at + 1] != "{":
        raise ValueError("not an object")
    found: list[_Member] = []
    lead = at + 1
    while True:
        start = _skip(text, lead)
        if text[start : start + 1] == "}" and not found:
            return found, start
        key, after = _DECODER.raw_decode(text, start)
        colon = _skip(text, after)
        if not isinstance(key, str) or text[colon : colon + 1] != ":":
            raise ValueError("a member without a name")
        value = _skip(text, colon + 1)
        _, end = _DECODER.raw_decode(text, value)
        found.append(_Member(key, lead, start, value, end))
        mark = _skip(text, end)
        if text[mark : mark + 1] == "}":
            return found, mark
        if text[mark : mark + 1] != ",":
            raise ValueError("no comma between two members")
        lead = mark + 1


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
