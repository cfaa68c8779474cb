"""Chat messages and their parts as messages and blocks of Anthropic's API; pure."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import msgspec

from pierhead.gateway.dialects.members import Members, invalid

Block = dict[str, Any]
_object = msgspec.json.Decoder(dict[str, Any]).decode
_IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")


def conversation(request: Members) -> tuple[str, list[dict[str, Any]]]:
    """(system, messages); instructions in the middle join those at the beginning, as there is one place for them."""
    system: list[str] = []
    made: list[dict[str, Any]] = []
    listed = request.each("messages")
    if not listed:
        raise invalid("messages", "at least one message is required.")
    for message in listed:
        role = message.choice("role", "system", "developer", "user", "assistant", "tool")
        if role is None:
            raise invalid(message.place("role"), "is missing.")
        message.refuse("names of speakers have no equal in Anthropic's API.", "name")
        if role in ("system", "developer"):
            system.append(_plain(message))
        elif role == "user":
            _say(made, "user", _blocks(message))
        elif role == "tool":
            _say(made, "user", [_result(message)])
        else:
            _say(made, "assistant", _spoken(message))
        message.done()
    if not made:
        raise invalid("messages", "at least one message of the user is required.")
    return "\n\n".join(filter(None, system)), made


def _say(made: list[dict[str, Any]], role: str, blocks: list[Block]) -> None:
    """Turns alternate: what one side says in a row is one message, with results of tools before anything else."""
    if not blocks:
        return
    if made and made[-1]["role"] == role:
        made[-1]["content"] += blocks
    else:
        made.append({"role": role, "content": blocks})


def _plain(message: Members) -> str:
    return "\n".join(block["text"] for block in _blocks(message, images=False))


def _blocks(message: Members, *, images: bool = True) -> list[Block]:
    value = message.any("content")
    if value is None:
        raise invalid(message.place("content"), "is missing.")
    if isinstance(value, str):
        return [{"type": "text", "text": value}] if value else []
    parts = Members({"content": value}, message.where).each("content")
    return [block for part in parts if (block := _part(part, images)) is not None]


def _part(part: Members, images: bool) -> Block | None:
    kind = part.need("type")
    if kind == "text":
        block = {"type": "text", "text": part.need("text")}
        part.done()
        return block if block["text"] else None
    if kind != "image_url" or not images:
        raise invalid(part.where, f"a part of type '{kind[:100]}' cannot be expressed in Anthropic's API here.")
    image = part.inner("image_url")
    part.done()
    if image is None:
        raise invalid(part.place("image_url"), "is missing.")
    url = image.need("url")
    image.choice("detail", "auto", "low", "high")
    image.done()
    return {"type": "image", "source": _source(url, image.place("url"))}


def _source(url: str, where: str) -> Block:
    if url.startswith(("https://", "http://")):
        return {"type": "url", "url": url}
    head, comma, data = url.partition(",")
    kind = head.removeprefix("data:").removesuffix(";base64")
    if not comma or not head.startswith("data:") or not head.endswith(";base64") or kind not in _IMAGES:
        raise invalid(where, f"must be an https address, or a data URL in base64 of {', '.join(_IMAGES)}.")
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(where, "is not base64.") from None
    return {"type": "base64", "media_type": kind, "data": data}


def _spoken(message: Members) -> list[Block]:
    """What the assistant said and called; its thoughts stay out, since only their maker can sign them."""
    blocks: list[Block] = []
    if message.has("content"):
        value = message.any("content")
        said = Members({"content": value}, message.where)
        blocks = [{"type": "text", "text": value}] if isinstance(value, str) and value else []
        if not isinstance(value, str):
            blocks = [block for part in said.each("content") if (block := _said(part)) is not None]
    refusal = message.text("refusal")
    if refusal:
        blocks.append({"type": "text", "text": refusal})
    blocks += [_call(call) for call in message.each("tool_calls")]
    message.ignore("content", "reasoning_content", "reasoning", "annotations")
    message.refuse("cannot be expressed in Anthropic's API.", "audio", "function_call")
    return blocks


def _said(part: Members) -> Block | None:
    kind = part.choice("type", "text", "refusal")
    text = part.need(kind or "text")
    part.done()
    return {"type": "text", "text": text} if text else None


def _call(call: Members) -> Block:
    call.choice("type", "function")
    id, function = call.need("id"), call.inner("function")
    call.ignore("index")
    call.done()
    if function is None:
        raise invalid(call.place("function"), "is missing.")
    name, arguments = function.need("name"), function.text("arguments") or "{}"
    function.done()
    try:
        given = _object(arguments)
    except (msgspec.MsgspecError, RecursionError):
        raise invalid(function.place("arguments"), "must be a JSON object, as text.") from None
    return {"type": "tool_use", "id": id, "name": name, "input": given}


def _result(message: Members) -> Block:
    return {
        "type": "tool_result",
        "tool_use_id": message.need("tool_call_id"),
        "content": _blocks(message),
    }
