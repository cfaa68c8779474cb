"""Answers about texts: runs the model for a request and writes what the field's clients expect."""

from __future__ import annotations

import base64
import importlib
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from . import asks
from .aside import aside
from .batching import Batcher, Item
from .faults import Refused, bad
from .metrics import Metrics
from .settings import Settings
from .tasks import Span, Texts
from .words import Coded, Text, Words

np: Any = importlib.import_module("numpy")
Gone = Callable[[], bool]
encode = msgspec.json.Encoder().encode


class Answers:
    """Answers by path (``answers[path](body, gone)`` gives the body of a 200)."""

    def __init__(self, texts: Texts, words: Words, batcher: Batcher, metrics: Metrics, settings: Settings) -> None:
        self._texts = texts
        self._words = words
        self._batcher = batcher
        self._metrics = metrics
        self._settings = settings
        self.context = words.context
        self._head = {"object": "list", "model": settings.name}
        paths: dict[str, dict[str, Callable[[bytes, Gone], Any]]] = {
            "classify": {"/v1/classify": self.classify},
            "tokens": {"/v1/classify": self.classify},
            "embeddings": {"/v1/embeddings": self.embeddings, "/v1/score": self.score},
            "rerank": {"/v1/rerank": self.rerank, "/v1/score": self.score},
        }
        self.paths = paths[settings.task]

    async def work(self, texts: list[Text], truncate: bool | None, gone: Gone) -> tuple[list[Any], list[Coded]]:
        """The model's result for each text, and the texts as tokens."""
        coded = await self._words.code(texts, self._settings.truncate if truncate is None else truncate)
        for place, one in enumerate(coded):
            if not one.ids:
                raise bad(f"text {place} has no tokens")
        found = await self._batcher.submit([Item(one, len(one.ids)) for one in coded], gone)
        self._metrics.tokens += sum(len(one.ids) for one in coded)
        self._metrics.truncated += sum(one.cut for one in coded)
        return found, coded

    async def classify(self, body: bytes, gone: Gone) -> bytes:
        """vLLM's shape; for labels of tokens each item has ``entities``."""
        request: asks.Classify = await aside(len(body), lambda: asks.read(body, asks.Classify))
        texts = asks.texts(request.input)
        found, coded = await self.work(texts, request.truncate, gone)
        if self._settings.task == "tokens":
            data = [self.entities(place, texts[place], spans) for place, spans in enumerate(found)]
        else:
            data = [self._label(place, scores) for place, scores in enumerate(found)]
        return encode({**self._began("classify"), "data": data, **_usage(coded)})

    def _label(self, place: int, scores: list[float]) -> dict[str, Any]:
        best = max(range(len(scores)), key=scores.__getitem__)
        return {"index": place, "label": self.label(best), "probs": scores, "num_classes": len(scores)}

    def label(self, number: int) -> str:
        """A class's name."""
        labels = self._texts.labels
        return labels[number] if number < len(labels) else f"LABEL_{number}"

    def entities(self, place: int, text: Text, spans: list[Span]) -> dict[str, Any]:
        """One text's stretches with a label."""
        whole = text if isinstance(text, str) else " ".join(map(str, text))
        told = [{**span._asdict(), "text": whole[span.start : span.end]} for span in spans]
        return {"index": place, "label": None, "probs": [], "num_classes": len(self._texts.labels), "entities": told}

    async def embeddings(self, body: bytes, gone: Gone) -> bytes:
        """OpenAI's shape, in plain numbers or as base64 of little-endian float32."""
        request: asks.Embeddings = await aside(len(body), lambda: asks.read(body, asks.Embeddings))
        vectors, coded = await self.work(asks.texts(request.input), request.truncate, gone)
        if request.dimensions is not None:
            vectors = shortened(vectors, request.dimensions)
        plain = request.encoding_format == "float"

        def written() -> bytes:
            data = [
                {"object": "embedding", "index": place, "embedding": numbers(vector) if plain else packed(vector)}
                for place, vector in enumerate(vectors)
            ]
            return encode({**self._head, "data": data, **_usage(coded)})

        return await aside(sum(vector.nbytes for vector in vectors), written)

    async def rerank(self, body: bytes, gone: Gone) -> bytes:
        """Cohere's and Jina's shape, best first."""
        request: asks.Rerank = await aside(len(body), lambda: asks.read(body, asks.Rerank))
        documents = asks.documents(request)
        scores, coded = await self.work([(request.query, text) for text in documents], request.truncate, gone)
        results: list[dict[str, Any]] = []
        for place in sorted(range(len(scores)), key=lambda n: -scores[n])[: request.top_n]:
            one: dict[str, Any] = {"index": place, "relevance_score": scores[place]}
            results.append(one | ({"document": {"text": documents[place]}} if request.return_documents else {}))
        usage = _usage(coded)
        meta = {"tokens": {"input_tokens": usage["usage"]["prompt_tokens"]}}
        return encode({"id": f"rerank-{uuid.uuid4().hex}", **self._head, "results": results, "meta": meta, **usage})

    async def score(self, body: bytes, gone: Gone) -> bytes:
        """vLLM's shape: a cross-encoder's score, or how close two vectors are (cosine)."""
        request: asks.Score = await aside(len(body), lambda: asks.read(body, asks.Score))
        pairs = asks.pairs(request)
        if self._settings.task == "rerank":
            scores, coded = await self.work([*pairs], request.truncate, gone)
        else:
            flat: list[Text] = [half for pair in pairs for half in pair]
            vectors, coded = await self.work(flat, request.truncate, gone)
            scores = [_cosine(vectors[n], vectors[n + 1]) for n in range(0, len(vectors), 2)]
        data = [{"index": place, "object": "score", "score": score} for place, score in enumerate(scores)]
        return encode({**self._began("score"), "data": data, **_usage(coded)})

    def _began(self, kind: str) -> dict[str, Any]:
        return {"id": f"{kind}-{uuid.uuid4().hex}", **self._head, "created": int(time.time())}


def shortened(vectors: list[Any], dimensions: int) -> list[Any]:
    """The first elements of each vector, of length one again."""
    if not 0 < dimensions <= len(vectors[0]):
        raise bad(f"'dimensions' must be 1 to {len(vectors[0])}")
    cut = [vector[:dimensions] for vector in vectors]
    return [vector / max(float(np.linalg.norm(vector)), 1e-12) for vector in cut]


def numbers(vector: Any) -> list[float]:
    """Without the digits that float32 does not have."""
    return np.round(vector.astype(np.float64), 8).tolist()


def packed(vector: Any) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _cosine(one: Any, other: Any) -> float:
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return round(float(np.dot(one, other)) / max(length, 1e-12), 7)


def _usage(coded: list[Coded]) -> dict[str, Any]:
    """At the end of every answer: tokens, and which texts were cut."""
    tokens = sum(len(one.ids) for one in coded)
    cut = [place for place, one in enumerate(coded) if one.cut]
    told: dict[str, Any] = {"truncated": cut} if cut else {}
    return told | {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def unknown(path: str, known: list[str]) -> Refused:
    """There is nothing at this path."""
    return Refused(404, f"this model does not answer {path[:100]}; it answers {', '.join(known)}", "not_found")
