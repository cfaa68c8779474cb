"""Reads answers of any dialect for people and for comparison: the text in them, whole or streamed; changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import httptools

_Object = dict[str, Any]


class Answer(NamedTuple):
    """An answer as a client got it; ``body`` is without transfer coding, ``whole`` whether its end is there."""

    status: int
    kind: str
    body: bytes
    whole: bool


class _Reader:
    def __init__(self) -> None:
        self.kind = ""
        self.body: list[bytes] = []
        self.whole = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self.kind = value.decode("latin-1").partition(";")[0].strip().lower()

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.whole = True


def parse(raw: bytes) -> Answer:
    """An HTTP answer, also one that is cut off; status 0 for what is none."""
    reader = _Reader()
    parser = httptools.HttpResponseParser(reader)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserError:
        if not reader.body:
            return Answer(0, "", b"", False)
    return Answer(parser.get_status_code(), reader.kind, b"".join(reader.body), reader.whole)


def objects(answer: Answer) -> Iterator[_Object]:
    """The JSON objects in an answer: its one, or those of its events or lines."""
    if answer.kind not in ("text/event-stream", "application/x-ndjson"):
        lines = [answer.body]
    else:
        lines = [line.removeprefix(b"data:").strip() for line in answer.body.splitlines() if line[:6] != b"event:"]
    for line in lines:
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield cast("_Object", value)


def streamed(answer: Answer) -> bool:
    """Whether the answer came in pieces."""
    return answer.kind in ("text/event-stream", "application/x-ndjson")


def text(answer: Answer) -> str:
    """All that the model said: text, reasoning and arguments of tool calls, each joined over the pieces."""
    parts: dict[str, list[str]] = {}
    whole = not streamed(answer)
    for item in objects(answer):
        for place, piece in _pieces(item, whole):
            parts.setdefault(place, []).append(piece)
    return "\n".join("".join(pieces) for _, pieces in sorted(parts.items()) if any(pieces))


def _pieces(item: _Object, whole: bool) -> Iterator[tuple[str, str]]:
    for choice in _dicts(item.get("choices")):
        where = f"a{choice.get('index', 0)}"
        yield from _message(where, _dict(choice.get("delta")) or _dict(choice.get("message")) or choice)
    if isinstance(item.get("message"), dict):
        yield from _message("b", _dict(item["message"]))
    if isinstance(item.get("response"), str):
        yield "c", item["response"]
    if isinstance(item.get("delta"), str):  # the Responses API; what its last events repeat is not read again
        yield f"d{item.get('output_index', 0)}", item["delta"]
    elif isinstance(item.get("delta"), dict):
        yield from _message(f"e{item.get('index', 0)}", _dict(item["delta"]))
    if whole:
        for i, part in enumerate(_dicts(item.get("output")) or [item]):
            yield from _message(f"f{i}", part)


def _message(where: str, message: _Object) -> Iterator[tuple[str, str]]:
    for name in ("reasoning_content", "thinking", "content", "text", "arguments", "partial_json"):
        value = message.get(name)
        if isinstance(value, str):
            yield where + name, value
        for i, part in enumerate(_dicts(value)):
            yield from _message(f"{where}{name}{i}", part)
    for call in _dicts(message.get("tool_calls")):
        function = _dict(call.get("function"))
        at = f"{where}t{call.get('index', 0)}"
        for name in ("name", "arguments"):
            value = function.get(name)
            if value:
                yield at, value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if message.get("type") == "tool_use" and message.get("input"):
        yield where + "input", json.dumps(message["input"], sort_keys=True)


def _dict(value: Any) -> _Object:
    return cast("_Object", value) if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[_Object]:
    return (
        [_dict(item) for item in cast("list[Any]", value) if isinstance(item, dict)] if isinstance(value, list) else []
    )
