"""Requests about texts, checked: OpenAI's embeddings, Cohere's and Jina's rerank, vLLM's score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .asks import Refused

MOST = 2048  # texts of one request


@dataclass(frozen=True)
class Embeddings:
    """Texts whose vectors are wanted, of ``dimensions`` elements (0: all), as numbers or ``packed``."""

    texts: list[str]
    dimensions: int
    packed: bool
    truncate: bool | None


@dataclass(frozen=True)
class Pairs:
    """Texts that are to be compared: for a rerank all with one query. ``top`` 0: all are told."""

    pairs: list[tuple[str, str]]
    top: int
    documents: bool
    truncate: bool | None


def embeddings(body: Mapping[str, Any]) -> Embeddings:
    """A body as a request; Refused says what is wrong with it."""
    how = body.get("encoding_format") or "float"
    if how not in ("float", "base64"):
        raise Refused("'encoding_format' must be float or base64", "encoding_format")
    return Embeddings(_texts(body, "input"), _count(body, "dimensions"), how == "base64", _switch(body, "truncate"))


def rerank(body: Mapping[str, Any]) -> Pairs:
    """The same for a query and documents, which may be objects with a ``text``."""
    query: Any = body.get("query")
    if not isinstance(query, str):
        raise Refused("'query' must be a text", "query")
    given: Any = body.get("documents")
    plain = [d.get("text") if isinstance(d, dict) else d for d in given] if isinstance(given, list) else given  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    documents = _texts({"documents": plain}, "documents")
    told = _switch(body, "return_documents") is True
    return Pairs([(query, text) for text in documents], _count(body, "top_n"), told, _switch(body, "truncate"))


def score(body: Mapping[str, Any]) -> Pairs:
    """The same for one text against many, or pair by pair."""
    first, second = _texts(body, "text_1"), _texts(body, "text_2")
    if len(first) not in (1, len(second)):
        raise Refused("'text_1' must be one text, or as many as 'text_2'", "text_1")
    first = first * len(second) if len(first) == 1 else first
    return Pairs(list(zip(first, second, strict=True)), 0, False, _switch(body, "truncate"))


def _texts(body: Mapping[str, Any], name: str) -> list[str]:
    given: Any = body.get(name)
    listed: Any = [given] if isinstance(given, str) else given
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):  # pyright: ignore[reportUnknownVariableType]
        raise Refused(f"'{name}' must be a text or a list of texts", name)
    if not 0 < len(listed) <= MOST:  # pyright: ignore[reportUnknownArgumentType]
        raise Refused(f"'{name}' must have 1 to {MOST} texts, this one has {len(listed)}", name)  # pyright: ignore[reportUnknownArgumentType]
    return listed  # pyright: ignore[reportUnknownVariableType]


def _count(body: Mapping[str, Any], name: str) -> int:
    value: Any = body.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refused(f"'{name}' must be a whole number of 1 or more", name)
    return value


def _switch(body: Mapping[str, Any], name: str) -> bool | None:
    value: Any = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"'{name}' must be true or false", name)
    return value
