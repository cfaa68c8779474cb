"""Requests about texts, in the shapes of the field: vLLM's classify and score, OpenAI's embeddings, Cohere's rerank."""

from __future__ import annotations

from typing import Any, Literal, cast

import msgspec

from .faults import bad
from .words import Text

MOST = 2048  # texts of one request


class Classify(msgspec.Struct):
    """One text or many; a pair is a list of two."""

    input: str | list[str | list[str]]
    truncate: bool | None = None


class Embeddings(msgspec.Struct):
    """Texts, or tokens that the client made itself."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    truncate: bool | None = None


class Document(msgspec.Struct):
    """A document with its text under a name."""

    text: str


class Rerank(msgspec.Struct):
    """Documents to put into order for a query."""

    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool | None = None
    truncate: bool | None = None


class Score(msgspec.Struct):
    """One text against many, or pair by pair."""

    text_1: str | list[str]
    text_2: str | list[str]
    truncate: bool | None = None


_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (Classify, Embeddings, Rerank, Score)
}


def read(body: bytes, kind: Any) -> Any:
    """The request; Refused 400 says what is wrong with it."""
    try:
        return _DECODERS[kind].decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise bad(f"the request cannot be used: {str(exc)[:300]}", "invalid_json") from exc


def texts(given: Any, what: str = "input") -> list[Text]:
    """What was given as a list of texts, pairs or lists of tokens; at least one, at most ``MOST``."""
    if isinstance(given, str):
        return [given]
    items = cast("list[Any]", given)
    if items and all(isinstance(one, int) for one in items):
        return [items]
    if not 0 < len(items) <= MOST:
        raise bad(f"'{what}' must have 1 to {MOST} texts, this one has {len(items)}")
    if any(isinstance(one, int) for one in items):
        raise bad(f"'{what}' has tokens and texts in one list")
    return [_pair(cast("list[Any]", one)) if isinstance(one, list) else one for one in items]


def _pair(item: list[Any]) -> Text:
    """A list inside the list: two texts, or the tokens of one."""
    if all(isinstance(one, int) for one in item):
        return item
    if len(item) != 2:
        raise bad(f"a pair is two texts, this one has {len(item)}")
    return item[0], item[1]


def documents(request: Rerank) -> list[str]:
    """The documents' texts."""
    found = [one if isinstance(one, str) else one.text for one in request.documents]
    if not 0 < len(found) <= MOST:
        raise bad(f"'documents' must have 1 to {MOST} texts, this one has {len(found)}")
    if request.top_n is not None and request.top_n < 1:
        raise bad("'top_n' must be 1 or more")
    return found


def pairs(request: Score) -> list[tuple[str, str]]:
    """The texts that are to be compared."""
    first = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    second = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    if not 0 < len(second) <= MOST or len(first) not in (1, len(second)):
        raise bad(f"'text_1' must be one text, or as many as 'text_2', and those 1 to {MOST}")
    if len(first) == 1:
        first = first * len(second)
    return list(zip(first, second, strict=True))
