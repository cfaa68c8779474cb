"""Tokenize and detokenize in vLLM's words and llama.cpp's, on llama.cpp's tokenizer; pure."""

from __future__ import annotations

from typing import Any

import msgspec

from pierhead.gateway.dialects.base import JSON, Call, Facts, Reply, Save, Send, Steps
from pierhead.gateway.faults import Fault, bad_request
from pierhead.gateway.usage import Usage


class _Tokenize(msgspec.Struct, kw_only=True):
    """``prompt`` or ``messages`` are vLLM's, ``content`` and the rest llama.cpp's."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    content: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None


class _Detokenize(msgspec.Struct, kw_only=True):
    model: str
    tokens: list[int]


class _Piece(msgspec.Struct):
    id: int
    piece: str | list[int] = ""


class _Tokens(msgspec.Struct):
    tokens: list[int | _Piece]


class _Text(msgspec.Struct):
    content: str


class _Prompt(msgspec.Struct):
    prompt: str


class Tokenize:
    """``/tokenize``."""

    kind = JSON
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def steps(self, body: bytes) -> Steps:
        request = _decoded(body, _Tokenize)
        given = [part for part in (request.prompt, request.messages, request.content) if part is not None]
        if len(given) != 1:
            raise bad_request("send one of 'prompt', 'messages' and 'content'.", param="prompt")
        if request.content is not None:
            return Send("llamacpp-tokenize", body)
        text, special = request.prompt or "", request.add_special_tokens is not False
        if request.messages is not None:
            asked: dict[str, Any] = {"messages": request.messages}
            asked["add_generation_prompt"] = request.add_generation_prompt is not False
            asked |= {"tools": request.tools} if request.tools else {}
            found = yield Call("llamacpp-template", msgspec.json.encode(asked))
            text, special = _told(found or b"", _Prompt).prompt, bool(request.add_special_tokens)
        wanted = {"content": text, "add_special": special, "parse_special": True, "with_pieces": True}
        tokens = _told((yield Call("llamacpp-tokenize", msgspec.json.encode(wanted))) or b"", _Tokens).tokens
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": self._facts.context,
            "tokens": [t if isinstance(t, int) else t.id for t in tokens],
            "token_strs": None,
        }
        if request.return_token_strs:
            answer["token_strs"] = [_piece(t) for t in tokens]
        return Reply(msgspec.json.encode(answer))

    def answer(self, body: bytes, usage: Usage) -> bytes:
        return body

    def events(self, data: bytes) -> bytes:
        return b""

    def end(self, usage: Usage) -> bytes:
        return b""


class Detokenize(Tokenize):
    """``/detokenize``; the text is told in both words."""

    def steps(self, body: bytes) -> Steps:
        request = _decoded(body, _Detokenize)
        yield from ()
        return Send("llamacpp-detokenize", msgspec.json.encode({"tokens": request.tokens}))

    def answer(self, body: bytes, usage: Usage) -> bytes:
        text = _told(body, _Text).content
        return msgspec.json.encode({"prompt": text, "content": text})


def _piece(token: int | _Piece) -> str:
    """A token's text; one that is part of a character comes as bytes."""
    if isinstance(token, int) or isinstance(token.piece, str):
        return "" if isinstance(token, int) else str(token.piece)
    return bytes(b & 255 for b in token.piece).decode("utf-8", "replace")


def _decoded(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise bad_request(f"the request cannot be used: {exc}.", code="invalid_json") from exc


def _told(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise Fault(502, "engine_failed", f"the engine's answer cannot be read: {exc}.", source="engine") from exc


def make(facts: Facts) -> Tokenize | None:
    """The translation for an engine with llama.cpp's tokenizer."""
    return Tokenize(facts) if "llamacpp-tokenize" in facts.serves else None


def make_detokenize(facts: Facts) -> Detokenize | None:
    """The same, backwards."""
    return Detokenize(facts) if "llamacpp-detokenize" in facts.serves else None
