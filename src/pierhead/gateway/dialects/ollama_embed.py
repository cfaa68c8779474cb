"""Vectors for Ollama's ``/api/embed`` and ``/api/embeddings``, with its cutting of texts that are too long; pure."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Sequence
from typing import Any

import msgspec

from pierhead.gateway.dialects import ollama_request as requests
from pierhead.gateway.dialects.base import JSON, Call, Facts, Keep, Reply, Save, Send, Steps
from pierhead.gateway.dialects.ollama_chunks import Clock
from pierhead.gateway.faults import Fault, bad_request
from pierhead.gateway.usage import Usage

_SPARE = 2  # tokens that the engine adds before and after a text
_BATCH = re.compile(r"batch size: (\d+)")
_MOST = 4096  # texts of one request


class _Vector(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Vectors(msgspec.Struct):
    data: list[_Vector]
    usage: _Usage = msgspec.field(default_factory=_Usage)


class _Tokens(msgspec.Struct):
    tokens: list[int]


class Embed:
    """One request of either; ``single`` is the older one, with one text and its vector as the engine made it."""

    kind = JSON
    saves: tuple[Save, ...] = ()

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._clock = Clock(facts)
        self._single = facts.operation.name == "ollama-embeddings"
        self._dimensions = 0

    def steps(self, body: bytes) -> Steps:
        self._clock.loaded()
        texts, truncate, keep = self._read(body)
        if keep is not None:
            yield Keep(keep)
        if not texts:
            return Reply(self._answer([], 0))
        if not all(texts):
            raise bad_request("a text to embed is empty.", param="input")
        try:
            found = yield Call("embeddings", self._ask(texts))
        except Fault as fault:
            if not _too_long(fault):
                raise
            if not truncate:
                raise bad_request("the input length exceeds the context length", param="input") from fault
            cut = yield from self._cut(texts, fault)
            return Send("embeddings", self._ask(cut))
        return Reply(self.answer(found or b"", Usage()))

    def _read(self, body: bytes) -> tuple[list[str], bool, float | None]:
        """The texts, whether they may be cut, and ``keep_alive``."""
        if self._single:
            one = requests.decoded(body, requests.EmbeddingsRequest)
            requests.settings(one.options, self._facts)
            return [one.prompt] if one.prompt else [], True, requests.seconds(one.keep_alive)
        many = requests.decoded(body, requests.EmbedRequest)
        requests.settings(many.options, self._facts)
        self._dimensions = many.dimensions or 0
        if self._dimensions < 0:
            raise bad_request("dimensions must be above 0.", param="dimensions")
        texts = many.input if isinstance(many.input, list) else [many.input] if many.input else []
        if len(texts) > _MOST:
            raise bad_request(f"a request may have {_MOST} texts, this one has {len(texts)}.", param="input")
        return texts, many.truncate is not False, requests.seconds(many.keep_alive)

    def _ask(self, texts: Sequence[list[int] | str]) -> bytes:
        return msgspec.json.encode({"model": self._facts.model, "input": texts})

    def _cut(self, texts: list[str], fault: Fault) -> Generator[Call, bytes | None, list[list[int] | str]]:
        """The texts with those that are too long as their first tokens."""
        batch = _BATCH.search(fault.message)
        limit = min(int(batch[1]) if batch else 1 << 30, self._facts.context or 1 << 30) - _SPARE
        if "llamacpp-tokenize" not in self._facts.serves or not 0 < limit < 1 << 29:
            raise bad_request("the input length exceeds the context length", param="input") from fault
        made: list[list[int] | str] = []
        for text in texts:
            if len(text.encode()) <= limit:  # a token is one byte at least
                made.append(text)
                continue
            body = yield Call("llamacpp-tokenize", msgspec.json.encode({"content": text, "add_special": False}))
            tokens = _decoded(body or b"", _Tokens).tokens
            made.append(tokens[:limit] if len(tokens) > limit else text)
        return made

    def answer(self, body: bytes, usage: Usage) -> bytes:
        found = _decoded(body, _Vectors)
        vectors = [v.embedding for v in sorted(found.data, key=lambda v: v.index)]
        return self._answer(vectors, found.usage.prompt_tokens)

    def _answer(self, vectors: list[list[float]], tokens: int) -> bytes:
        if self._single:
            return msgspec.json.encode({"embedding": vectors[0] if vectors else []})
        figures = self._clock.figures(Usage(tokens), {})
        return msgspec.json.encode(
            {
                "model": self._facts.model,
                "embeddings": [_shortened(v, self._dimensions) for v in vectors],
                "total_duration": figures["total_duration"],
                "load_duration": figures["load_duration"],
                "prompt_eval_count": tokens,
            }
        )

    def events(self, data: bytes) -> bytes:
        return b""

    def end(self, usage: Usage) -> bytes:
        return b""


def _decoded(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise Fault(502, "engine_failed", f"the engine's answer cannot be read: {exc}.", source="engine") from exc


def _too_long(fault: Fault) -> bool:
    return fault.code == "context_length_exceeded" or "too large to process" in fault.message


def _shortened(vector: list[float], dimensions: int) -> list[float]:
    """Of length one; fewer dimensions where asked, as models that are trained for that allow."""
    vector = vector[:dimensions] if 0 < dimensions < len(vector) else vector
    length = math.sqrt(sum(x * x for x in vector))
    if not math.isfinite(length):
        raise Fault(502, "engine_failed", "the engine's vector has values that are no numbers.", source="engine")
    return [x / length for x in vector] if length > 1e-12 else vector


def make(facts: Facts) -> Embed | None:
    """The translation for an engine that makes vectors."""
    return Embed(facts) if "embeddings" in facts.serves else None
