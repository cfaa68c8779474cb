"""Ranking in the spellings of the field: rerank of Cohere and Jina, score of vLLM, on llama.cpp's reranker; pure."""

from __future__ import annotations

from typing import Any

import msgspec

from pierhead.gateway.dialects.base import JSON, Call, Facts, Reply, Save, Send, Steps
from pierhead.gateway.faults import Fault, bad_request
from pierhead.gateway.usage import Usage

_MOST = 4096


class _Document(msgspec.Struct):
    text: str


class _Rerank(msgspec.Struct, kw_only=True):
    model: str
    query: str
    documents: list[str | _Document]
    top_n: int | None = None
    return_documents: bool | None = None


class _Score(msgspec.Struct, kw_only=True):
    model: str
    text_1: str | list[str]
    text_2: str | list[str]


class _One(msgspec.Struct):
    index: int
    relevance_score: float


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    total_tokens: int = 0


class _Ranked(msgspec.Struct):
    results: list[_One]
    usage: _Usage = msgspec.field(default_factory=_Usage)


class Rerank:
    """``/v1/rerank``, ``/v2/rerank``: documents as strings or objects."""

    kind = JSON
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._texts: list[str] = []
        self._request: _Rerank | None = None

    def steps(self, body: bytes) -> Steps:
        self._request = request = _decoded(body, _Rerank)
        self._texts = [d if isinstance(d, str) else d.text for d in request.documents]
        if not 0 < len(self._texts) <= _MOST:
            raise bad_request(f"'documents' must have 1 to {_MOST} texts.", param="documents")
        if request.top_n is not None and request.top_n < 1:
            raise bad_request("'top_n' must be 1 or more.", param="top_n")
        yield from ()
        return Send("llamacpp-rerank", _asked(self._facts, request.query, self._texts))

    def answer(self, body: bytes, usage: Usage) -> bytes:
        assert self._request is not None
        found = _ranked(body, len(self._texts))
        ordered = sorted(found.results, key=lambda one: -one.relevance_score)[: self._request.top_n]
        results: list[dict[str, Any]] = []
        for one in ordered:
            told: dict[str, Any] = {"index": one.index, "relevance_score": one.relevance_score}
            if self._request.return_documents:
                told["document"] = {"text": self._texts[one.index]}
            results.append(told)
        usages = {"prompt_tokens": found.usage.prompt_tokens, "total_tokens": found.usage.total_tokens}
        return msgspec.json.encode(
            {
                "id": self._facts.id,
                "object": "list",
                "model": self._facts.model,
                "results": results,
                "usage": usages,
                "meta": {"tokens": {"input_tokens": found.usage.prompt_tokens}},
            }
        )

    def events(self, data: bytes) -> bytes:
        return b""

    def end(self, usage: Usage) -> bytes:
        return b""


class Score:
    """``/v1/score``: how well texts fit each other, one with many or pair by pair."""

    kind = JSON
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def steps(self, body: bytes) -> Steps:
        request = _decoded(body, _Score)
        first = [request.text_1] if isinstance(request.text_1, str) else request.text_1
        second = [request.text_2] if isinstance(request.text_2, str) else request.text_2
        if not 0 < len(second) <= _MOST or len(first) not in (1, len(second)):
            raise bad_request("'text_1' must be one text, or as many as 'text_2'.", param="text_1")
        asked = [(first[0], second)] if len(first) == 1 else [(a, [b]) for a, b in zip(first, second, strict=True)]
        operation = "rerank" if "rerank" in self._facts.serves else "llamacpp-rerank"
        scores, tokens = list[float](), 0
        for query, texts in asked:
            found = _ranked((yield Call(operation, _asked(self._facts, query, texts))) or b"", len(texts))
            scores += [one.relevance_score for one in sorted(found.results, key=lambda one: one.index)]
            tokens += found.usage.prompt_tokens
        data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
        answer = {
            "id": self._facts.id,
            "object": "list",
            "created": self._facts.created,
            "model": self._facts.model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return Reply(msgspec.json.encode(answer))

    def answer(self, body: bytes, usage: Usage) -> bytes:
        return body

    def events(self, data: bytes) -> bytes:
        return b""

    def end(self, usage: Usage) -> bytes:
        return b""


def _asked(facts: Facts, query: str, texts: list[str]) -> bytes:
    return msgspec.json.encode({"model": facts.model, "query": query, "documents": texts})


def _ranked(body: bytes, count: int) -> _Ranked:
    try:
        found = msgspec.json.decode(body, type=_Ranked)
        if any(not 0 <= one.index < count for one in found.results):
            raise ValueError("it names a document that there is not")
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise Fault(502, "engine_failed", f"the engine's answer cannot be read: {exc}.", source="engine") from exc
    return found


def _decoded(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise bad_request(f"the request cannot be used: {exc}.", code="invalid_json") from exc


def make(facts: Facts) -> Rerank | None:
    """The translation for llama.cpp's reranker; others answer by themselves."""
    return Rerank(facts) if "llamacpp-rerank" in facts.serves else None


def make_score(facts: Facts) -> Score | None:
    """The translation for any engine that ranks."""
    return Score(facts) if facts.serves & {"rerank", "llamacpp-rerank"} else None
