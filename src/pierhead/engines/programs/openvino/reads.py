"""The HTTP side of models that read: vectors of texts, how well documents fit a query, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import time
import uuid
from collections.abc import Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from . import texts
from .asks import Refused
from .batching import Batcher, Item
from .wire import json_body, metrics, refused

np: Any = importlib.import_module("numpy")


class Reads:
    """Answers requests with one ``pipeline`` of ``task`` embed or rank; ``context``: the most tokens of one text.

    ``tokenizer`` counts them; a text that is longer is refused, or cut where the request or ``truncate`` says so.
    """

    def __init__(self, pipeline: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
        self._pipeline = pipeline
        self._tokenizer = tokenizer
        self._settings = settings
        self._ranks = settings["task"] == "rank"
        self._batcher = Batcher(
            self._rank if self._ranks else self._embed, settings["max_batch"], settings["max_batch_tokens"]
        )
        self._tokens = 0

    def app(self) -> Starlette:
        """The routes."""
        posts = {"/v1/score": self.score} | (
            {"/v1/rerank": self.rerank} if self._ranks else {"/v1/embeddings": self.embeddings}
        )
        routes = [Route(path, call, methods=["POST"]) for path, call in posts.items()]
        routes += [Route("/health", self.health), Route("/metrics", self.metrics)]
        return Starlette(routes=routes, exception_handlers={Refused: refused})

    def try_out(self) -> None:
        """Let the pipeline read once, so that it fails at the start if it must, and its first client need not wait."""
        self._lengths([("a", "b")] if self._ranks else [("a",)], None)
        found = self._rank("a", ["b"]) if self._ranks else self._embed("", ["a"])
        if len(found) != 1:
            raise ValueError("the model gives no answer for a text")

    async def health(self, _: Request) -> Response:
        return PlainTextResponse("ok")

    async def metrics(self, _: Request) -> Response:
        return metrics(
            {
                "openvino_requests_running gauge": self._batcher.running,
                "openvino_requests_waiting gauge": self._batcher.waiting,
                "openvino_prompt_tokens_total counter": self._tokens,
            }
        )

    async def embeddings(self, request: Request) -> Response:
        ask = texts.embeddings(await json_body(request))
        lengths = await asyncio.to_thread(self._lengths, [(text,) for text in ask.texts], ask.truncate)
        items = [Item("", text, length) for text, length in zip(ask.texts, lengths, strict=True)]
        vectors = await _while_here(request, self._work(items))
        if ask.dimensions:
            vectors = _shortened(vectors, ask.dimensions)
        data = [
            {"object": "embedding", "index": place, "embedding": _packed(one) if ask.packed else _numbers(one)}
            for place, one in enumerate(vectors)
        ]
        return JSONResponse({"object": "list", "model": self._settings["model"], "data": data, **_usage(lengths)})

    async def rerank(self, request: Request) -> Response:
        ask = texts.rerank(await json_body(request))
        scores, usage = await self._scores(request, ask)
        best = sorted(range(len(scores)), key=lambda n: -scores[n])[: ask.top or None]
        results: list[dict[str, Any]] = []
        for place in best:
            one: dict[str, Any] = {"index": place, "relevance_score": scores[place]}
            results.append(one | ({"document": {"text": ask.pairs[place][1]}} if ask.documents else {}))
        meta = {"tokens": {"input_tokens": usage["usage"]["prompt_tokens"]}}
        head = {"id": f"rerank-{uuid.uuid4().hex}", "object": "list", "model": self._settings["model"]}
        return JSONResponse({**head, "results": results, "meta": meta, **usage})

    async def score(self, request: Request) -> Response:
        ask = texts.score(await json_body(request))
        scores, usage = await self._scores(request, ask)
        data = [{"index": place, "object": "score", "score": one} for place, one in enumerate(scores)]
        head = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        return JSONResponse({**head, "model": self._settings["model"], "data": data, **usage})

    async def _scores(self, request: Request, ask: texts.Pairs) -> tuple[list[float], dict[str, Any]]:
        """How well each pair fits: as the model says, or by how near their vectors are (cosine)."""
        if self._ranks:
            lengths = await asyncio.to_thread(self._lengths, ask.pairs, ask.truncate)
            items = [Item(one, two, length) for (one, two), length in zip(ask.pairs, lengths, strict=True)]
            return await _while_here(request, self._work(items)), _usage(lengths)
        flat = [text for pair in ask.pairs for text in pair]
        lengths = await asyncio.to_thread(self._lengths, [(text,) for text in flat], ask.truncate)
        items = [Item("", text, length) for text, length in zip(flat, lengths, strict=True)]
        vectors = await _while_here(request, self._work(items))
        return [_cosine(vectors[n], vectors[n + 1]) for n in range(0, len(vectors), 2)], _usage(lengths)

    async def _work(self, items: list[Item]) -> list[Any]:
        found = await self._batcher.work(items)
        self._tokens += sum(item.length for item in items)
        return found

    def _lengths(self, given: list[Any], truncate: bool | None) -> list[int]:
        """How many tokens each text or pair has; Refused for one that is too long and must not be cut."""
        most = self._settings["context"]
        found: list[int] = []
        for start in range(0, len(given), 64):
            columns = [list(column) for column in zip(*given[start : start + 64], strict=True)]
            found += [int(n) for n in self._tokenizer.encode(*columns).attention_mask.data.sum(axis=1)]
        if truncate or (truncate is None and self._settings["truncate"]):
            return [min(length, most) for length in found]
        for place, length in enumerate(found):
            if length > most:
                raise Refused(
                    f"This model's maximum context length is {most} tokens, and text {place} has {length}; "
                    "'truncate' cuts it",
                    "input",
                )
        return found

    def _embed(self, _: str, batch: list[str]) -> list[Any]:
        return list(np.asarray(self._pipeline.embed_documents(batch), np.float32))

    def _rank(self, query: str, batch: list[str]) -> list[float]:
        scores = dict(self._pipeline.rerank(query, batch))
        return [round(float(scores[place]), 7) for place in range(len(batch))]


async def _while_here(request: Request, work: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """The result, unless the client leaves before."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused("the client is gone", status=499)
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _left(request: Request) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _shortened(vectors: list[Any], dimensions: int) -> list[Any]:
    """The first elements of each vector, of length one again."""
    if dimensions > len(vectors[0]):
        raise Refused(f"'dimensions' must be 1 to {len(vectors[0])}", "dimensions")
    return [one[:dimensions] / max(float(np.linalg.norm(one[:dimensions])), 1e-12) for one in vectors]


def _numbers(vector: Any) -> list[float]:
    """Without the digits that float32 does not have."""
    return np.round(vector.astype(np.float64), 8).tolist()


def _packed(vector: Any) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _cosine(one: Any, other: Any) -> float:
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return round(float(np.dot(one, other)) / max(length, 1e-12), 7)


def _usage(lengths: list[int]) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}}
