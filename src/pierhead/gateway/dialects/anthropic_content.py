"""Anthropic's messages and their blocks as messages of a chat request; pure."""

from __future__ import annotations

from typing import Any

import msgspec

from pierhead.gateway.dialects.members import Members, invalid

Part = dict[str, Any]
_PROSE = ("text", "image", "document", "search_result")


def messages(request: Members) -> list[dict[str, Any]]:
    """``system`` and ``messages`` in chat's words; Fault 400 for what chat has no words for."""
    made: list[dict[str, Any]] = []
    system = _system(request)
    if system:
        made.append({"role": "system", "content": system})
    listed = request.each("messages")
    if not listed:
        raise invalid("messages", "at least one message is required.")
    for message in listed:
        role = message.choice("role", "user", "assistant", "system")
        if role is None:
            raise invalid(message.place("role"), "is missing.")
        blocks = _blocks(message)
        message.done()
        made += _SAID[role](blocks)
    return made


def _system(request: Members) -> str:
    value = request.any("system")
    if value is None or isinstance(value, str):
        return value or ""
    return _plain(Members({"content": value}, "system"))


def _plain(holder: Members) -> str:
    """Text blocks in one string, as templates want system prompts."""
    texts = [_text(block) for block in _blocks(holder) if _is(block, "text")]
    return "\n".join(texts)


def _blocks(holder: Members) -> list[Members]:
    """The blocks of ``content``; a string is one text block."""
    value = holder.any("content")
    if value is None:
        raise invalid(holder.place("content"), "is missing.")
    if isinstance(value, str):
        return [Members({"type": "text", "text": value}, holder.place("content"))] if value else []
    return Members({"content": value}, holder.where).each("content")


def _kind(block: Members, *known: str) -> str:
    kind = block.need("type")
    if kind not in known:
        raise invalid(block.where, _REFUSED.get(kind, f"a block of type '{kind[:100]}' cannot be expressed here."))
    block.ignore("cache_control")
    return kind


def _is(block: Members, kind: str) -> bool:
    return _kind(block, kind) == kind


_REFUSED = {
    "redacted_thinking": "redacted thinking can be read by its maker only; leave this block out.",
    "server_tool_use": "tools that run on Anthropic's servers do not exist here.",
    "container_upload": "there are no containers to upload to here.",
    "thinking": "thinking belongs to the assistant's turns.",
    "tool_use": "tool_use belongs to the assistant's turns.",
    "tool_result": "tool_result belongs to the user's turns.",
}


# --- who said it ------------------------------------------------------------------------------------------------------


def _user(blocks: list[Members]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    parts: list[Part] = []
    for block in blocks:
        kind = _kind(block, "tool_result", *_PROSE)
        if kind != "tool_result":
            parts += _prose(block, kind)
        elif parts:
            raise invalid(block.where, "tool_result blocks must come before all others of their message.")
        else:
            results.append(_result(block))
    return [*results, {"role": "user", "content": joined(parts)}] if parts or not results else results


def _assistant(blocks: list[Members]) -> list[dict[str, Any]]:
    text: list[str] = []
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        kind = _kind(block, "text", "thinking", "tool_use")
        if kind == "text":
            text.append(_text(block))
        elif kind == "thinking":
            thought.append(block.need("thinking"))
            block.ignore("signature")
            block.done()
        else:
            calls.append(_call(block))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(text)}
    if any(thought):
        message["reasoning_content"] = "\n".join(filter(None, thought))
    if calls:
        message["tool_calls"] = calls
    return [message]


def _told(blocks: list[Members]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "\n".join(_text(block) for block in blocks if _is(block, "text"))}]


_SAID = {"user": _user, "assistant": _assistant, "system": _told}


# --- blocks -----------------------------------------------------------------------------------------------------------


def joined(parts: list[Part]) -> str | list[Part]:
    """Parts as the content of a message: a single text is a plain string."""
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _text(block: Members) -> str:
    text = block.need("text")
    block.refuse("citations cannot be expressed here.", "citations")
    block.done()
    return text


def _prose(block: Members, kind: str) -> list[Part]:
    if kind == "text":
        return [{"type": "text", "text": _text(block)}]
    if kind == "image":
        return [_image(block)]
    return _document(block) if kind == "document" else [_search_result(block)]


def _image(block: Members) -> Part:
    source = block.inner("source")
    if source is None:
        raise invalid(block.place("source"), "is missing.")
    kind = source.need("type")
    if kind == "base64":
        url = f"data:{source.need('media_type')};base64,{source.need('data')}"
    elif kind == "url":
        url = source.need("url")
    else:
        raise invalid(source.where, f"a source of type '{kind[:100]}' cannot be expressed here; send base64 or a url.")
    source.done()
    changes = block.inner("transformations")
    if changes is not None:
        changes.choice("oversized_image", "downsize")
        changes.done()
    block.done()
    return {"type": "image_url", "image_url": {"url": url}}


def _document(block: Members) -> list[Part]:
    """A document as text between tags, as Anthropic's own guide has documents written into a prompt."""
    source, title, context = block.inner("source"), block.text("title"), block.text("context")
    _no_citations(block)
    block.done()
    if source is None:
        raise invalid(block.place("source"), "is missing.")
    head = "<document>\n"
    head += f"<title>{title}</title>\n" if title else ""
    head += f"<context>{context}</context>\n" if context else ""
    inside = _source(source)
    before, after = f"{head}<document_content>\n", "\n</document_content>\n</document>"
    if len(inside) == 1 and inside[0]["type"] == "text":
        return [{"type": "text", "text": f"{before}{inside[0]['text']}{after}"}]
    return [{"type": "text", "text": before}, *inside, {"type": "text", "text": after}]


def _source(source: Members) -> list[Part]:
    kind = source.need("type")
    if kind == "text":
        source.choice("media_type", "text/plain")
        parts: list[Part] = [{"type": "text", "text": source.need("data")}]
    elif kind == "content":
        parts = [part for block in _blocks(source) for part in _prose(block, _kind(block, "text", "image"))]
    else:
        what = "PDF files" if kind in ("base64", "url") else f"sources of type '{kind[:100]}'"
        raise invalid(source.where, f"{what} are not read here; send the document's text.")
    source.done()
    return parts


def _search_result(block: Members) -> Part:
    title, source = block.need("title"), block.need("source")
    _no_citations(block)
    text = _plain(block)
    block.done()
    return {
        "type": "text",
        "text": f"<search_result>\n<title>{title}</title>\n<source>{source}</source>\n{text}\n</search_result>",
    }


def _no_citations(block: Members) -> None:
    wanted = block.inner("citations")
    if wanted is not None:
        wanted.refuse("citations cannot be made here.", "enabled")
        wanted.done()


def _call(block: Members) -> dict[str, Any]:
    arguments = block.object("input")
    block.refuse("calls from code on Anthropic's servers do not exist here.", "toolset_name")
    caller = block.inner("caller")
    if caller is not None:
        caller.choice("type", "direct")
        caller.done()
    call = {
        "id": block.need("id"),
        "type": "function",
        "function": {"name": block.need("name"), "arguments": msgspec.json.encode(arguments or {}).decode()},
    }
    block.done()
    return call


def _result(block: Members) -> dict[str, Any]:
    call = block.need("tool_use_id")
    failed = block.flag("is_error")
    block.refuse("toolsets do not exist here.", "toolset_name")
    inside = _blocks(block) if block.has("content") else []
    parts = [part for inner in inside for part in _prose(inner, _kind(inner, *_PROSE))]
    block.done()
    if failed:
        parts = [{"type": "text", "text": FAILED}, *parts] if parts and parts[0]["type"] != "text" else _marked(parts)
    return {"role": "tool", "tool_call_id": call, "content": joined(parts)}


FAILED = "Error: "  # chat has no member that says so


def _marked(parts: list[Part]) -> list[Part]:
    first = parts[0]["text"] if parts else ""
    return [{"type": "text", "text": FAILED + first}, *parts[1:]]
