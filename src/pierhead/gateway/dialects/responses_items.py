"""Items of the Responses API: in the form in which they are stored, and as messages of a chat request; pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any, cast

from pierhead.gateway.dialects.members import Members, invalid

Item = dict[str, Any]
Part = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
_IDS = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def listed(value: Any, where: str) -> list[Item]:
    """``input`` or ``items`` as items; a string is what the user says."""
    if value is None:
        return []
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise invalid(where, "must be a string or an array of items.")
    found: list[Item] = []
    for number, item in enumerate(cast("list[Any]", value)):
        if not isinstance(item, dict):
            raise invalid(f"{where}.{number}", "must be an object.")
        found.append(cast("Item", item))
    return found


def normal(item: Item, where: str, made: str) -> Item:
    """An item as it is stored and listed: with its type, an id (``made`` if it has none), its content in parts."""
    kind = item.get("type") or ("message" if "role" in item else None)
    if not isinstance(kind, str) or kind not in _KINDS:
        what = "runs on OpenAI's servers only" if str(kind).endswith("_call") else "cannot be expressed here"
        raise invalid(where, f"an item of type '{str(kind)[:100]}' {what}.")
    whole = {"type": kind, **item}
    if kind == "item_reference":
        return whole
    given = item.get("id")
    if given is not None and not isinstance(given, str):
        raise invalid(f"{where}.id", "must be a string.")
    whole["id"] = given or f"{_IDS[kind]}_{made}"
    if kind != "reasoning":
        whole.setdefault("status", "completed")
    if kind == "message" and isinstance(item.get("content"), str):
        spoken = item.get("role") == "assistant"
        part: Part = {"type": "output_text" if spoken else "input_text", "text": item["content"]}
        whole["content"] = [part | {"annotations": []} if spoken else part]
    return whole


class Conversation:
    """Builds the messages of a chat request from items, in order."""

    def __init__(self, instructions: str | None = None) -> None:
        self.messages: list[dict[str, Any]] = []
        self._thought: list[str] = []
        if instructions:
            self.messages.append({"role": "system", "content": instructions})

    def add(self, items: Iterable[tuple[Item, str]]) -> None:
        """Items and their places in the request; Fault 400 for what chat has no words for."""
        for item, where in items:
            members = Members(item, where)
            kind = members.need("type")
            members.ignore("id", "status", "phase", "created_by")
            self._add(kind, members)
            members.done()

    def _add(self, kind: str, item: Members) -> None:
        if kind == "message":
            self._message(item)
        elif kind == "function_call":
            self._call(item)
        elif kind == "function_call_output":
            self._output(item)
        else:
            self._reasoning(item)

    def finish(self) -> list[dict[str, Any]]:
        """The messages; thoughts that nothing followed become a message of their own."""
        if self._thought:
            self._assistant()
        return self.messages

    def _assistant(self, content: Any = "", fresh: bool = True) -> dict[str, Any]:
        """The assistant's message that is under way, or a new one; it takes the thoughts before it along."""
        last = self.messages[-1] if self.messages else None
        if fresh or self._thought or last is None or last["role"] != "assistant":
            last = {"role": "assistant", "content": content}
            if self._thought:
                last["reasoning_content"] = "\n".join(self._thought)
                self._thought = []
            self.messages.append(last)
        return last

    def _message(self, item: Members) -> None:
        role = item.choice("role", *_ROLES)
        if role is None:
            raise invalid(item.place("role"), "is missing.")
        parts = _parts(item, "content", spoken=role == "assistant")
        if role == "assistant":
            self._assistant("".join(part["text"] for part in parts))
            return
        if self._thought:
            self._assistant()
        if role == "user":
            self.messages.append({"role": "user", "content": _joined(parts)})
        else:
            self._system("\n".join(part.get("text", "") for part in parts))

    def _system(self, text: str) -> None:
        """Templates know one system message, at the beginning, and no developer."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == "system":
            last["content"] = f"{last['content']}\n\n{text}"
        else:
            self.messages.append({"role": "system", "content": text})

    def _call(self, item: Members) -> None:
        item.refuse("namespaces of tools do not exist here.", "namespace")
        caller = item.inner("caller")
        if caller is not None:
            caller.choice("type", "direct")
            caller.done()
        function = {"name": item.need("name"), "arguments": item.need("arguments")}
        call = {"id": item.need("call_id"), "type": "function", "function": function}
        self._assistant(fresh=False).setdefault("tool_calls", []).append(call)

    def _output(self, item: Members) -> None:
        item.ignore("caller")
        if self._thought:
            self._assistant()
        parts = _parts(item, "output")
        self.messages.append({"role": "tool", "tool_call_id": item.need("call_id"), "content": _joined(parts)})

    def _reasoning(self, item: Members) -> None:
        content = [part.need("text") for part in _pieces(item, "content", "reasoning_text")]
        summary = [part.need("text") for part in _pieces(item, "summary", "summary_text")]
        if item.text("encrypted_content") is not None and not content and not summary:
            raise invalid(item.where, "encrypted reasoning can be read by its maker only; leave this item out.")
        self._thought += content or summary


def _pieces(item: Members, name: str, kind: str) -> list[Members]:
    pieces = item.each(name)
    for piece in pieces:
        piece.choice("type", kind)
    return pieces


def _parts(item: Members, name: str, spoken: bool = False) -> list[Part]:
    """The parts of a message's content or of a call's output, in chat's words."""
    value = item.any(name)
    if value is None:
        raise invalid(item.place(name), "is missing.")
    if isinstance(value, str):
        return [{"type": "text", "text": value}] if value else []
    parts: list[Part] = []
    for part in Members({name: value}, item.where).each(name):
        parts.append(_said(part) if spoken else _given(part))
        part.done()
    return parts


def _said(part: Members) -> Part:
    kind = part.choice("type", "output_text", "input_text", "refusal")
    part.ignore("annotations", "logprobs")
    return {"type": "text", "text": part.need("refusal" if kind == "refusal" else "text")}


def _given(part: Members) -> Part:
    kind = part.choice("type", "input_text", "output_text", "input_image", "input_file")
    part.ignore("prompt_cache_breakpoint")
    if kind == "input_image":
        part.refuse("files are not kept here; send the image itself.", "file_id")
        image: Part = {"url": part.need("image_url")}
        detail = part.choice("detail", "auto", "low", "high", "original")
        return {"type": "image_url", "image_url": image | ({"detail": detail} if detail else {})}
    if kind == "input_file":
        return {"type": "text", "text": _file(part)}
    if kind is None:
        raise invalid(part.place("type"), "is missing.")
    part.ignore("annotations", "logprobs")
    return {"type": "text", "text": part.need("text")}


def _file(part: Members) -> str:
    """A text file as text between tags; Fault 400 for all that is no text."""
    part.refuse("files are not kept here; send the file's data.", "file_id", "file_url")
    part.ignore("detail")
    name = part.text("filename")
    head, comma, data = part.need("file_data").rpartition(",")
    try:
        text = base64.b64decode(data, validate=True).decode()
    except (binascii.Error, ValueError):
        text = ""
    if not text or (comma and not head.startswith("data:text/")):
        raise invalid(part.where, "only text files are read here; send base64 of UTF-8 text.")
    title = f"<title>{name}</title>\n" if name else ""
    return f"<document>\n{title}<document_content>\n{text}\n</document_content>\n</document>"


def _joined(parts: list[Part]) -> str | list[Part]:
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
