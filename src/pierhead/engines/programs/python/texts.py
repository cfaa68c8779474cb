"""``embed``, ``classify``, ``rerank`` and ``transcribe`` behind the routes of the field."""

from __future__ import annotations

import array
import base64
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, cast

from fastapi import FastAPI, File, Form, Response, UploadFile
from pydantic import BaseModel, ConfigDict

from .answers import whole
from .batching import Batcher
from .calls import Calls
from .faults import Fault
from .model import Method, Model

_FLAT = ConfigDict(extra="allow", protected_namespaces=())


class EmbeddingRequest(BaseModel):
    """Texts that become vectors."""

    model_config = _FLAT
    model: str = ""
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"


class ClassifyRequest(BaseModel):
    """Texts that are put into classes."""

    model_config = _FLAT
    model: str = ""
    input: str | list[str]


class RerankRequest(BaseModel):
    """Documents that are put in the order in which they fit a query."""

    model_config = _FLAT
    model: str = ""
    query: str
    documents: list[str | dict[str, Any]]
    top_n: int | None = None
    return_documents: bool = False


def _head(prefix: str, model: Model) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model.settings.name,
    }


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _asker(model: Model, calls: Calls, method: Method) -> Callable[[list[str]], Awaitable[list[Any]]]:
    """Texts to answers, collected over requests where the model takes batches."""

    async def work(texts: list[Any]) -> Any:
        return await calls.ask(method.call, texts)

    size = model.settings.max_batch_size
    return Batcher(work, size if size > 1 else 1 << 30, model.settings.batch_delay_ms / 1000).ask


def add_embed(app: FastAPI, model: Model, calls: Calls, method: Method) -> None:
    """``/v1/embeddings``: the method is given texts and gives a vector for each."""
    ask = _asker(model, calls, method)

    async def handle(body: EmbeddingRequest) -> Response:
        vectors = [_vector(found) for found in await ask(_listed(body.input))]
        data = [
            {"object": "embedding", "index": at, "embedding": _packed(v) if body.encoding_format == "base64" else v}
            for at, v in enumerate(vectors)
        ]
        return whole({"object": "list", "model": model.settings.name, "data": data})

    _route(app, "/v1/embeddings", handle, EmbeddingRequest, method)


def _vector(found: Any) -> list[float]:
    listed: Any = found.tolist() if hasattr(found, "tolist") else found
    return [float(number) for number in listed]


def _packed(vector: list[float]) -> str:
    return base64.b64encode(array.array("f", vector).tobytes()).decode()


def add_classify(app: FastAPI, model: Model, calls: Calls, method: Method) -> None:
    """``/v1/classify``: for each text a label, a dict of labels and probabilities, or a label with its probability."""
    ask = _asker(model, calls, method)

    async def handle(body: ClassifyRequest) -> Response:
        found = await ask(_listed(body.input))
        data = [{"index": at, **_classes(one)} for at, one in enumerate(found)]
        return whole({**_head("classify", model), "data": data})

    _route(app, "/v1/classify", handle, ClassifyRequest, method)


def _classes(given: Any) -> dict[str, Any]:
    kind = type(given).__name__
    one: Any = tuple(cast("list[Any]", given)) if isinstance(given, list) else given
    if isinstance(one, dict):
        return _named(cast("dict[Any, Any]", one))
    if isinstance(one, str):
        return {"label": one, "probs": [1.0], "num_classes": 1}
    if isinstance(one, tuple):
        label, prob = cast("tuple[Any, Any]", one)
        return {"label": str(label), "probs": [float(prob)], "num_classes": 1}
    raise Fault(500, "model_failed", f"classify gave {kind}: give a label, or a dict of labels")


def _named(one: dict[Any, Any]) -> dict[str, Any]:
    """Labels with their probabilities; what has a ``label`` already stays as it is."""
    if "label" in one:
        return {str(name): value for name, value in one.items()}
    probs = {str(label): float(prob) for label, prob in one.items()}
    best = max(probs, key=lambda label: probs[label], default="")
    return {"label": best, "probs": list(probs.values()), "num_classes": len(probs), "labels": list(probs)}


def add_rerank(app: FastAPI, model: Model, calls: Calls, method: Method) -> None:
    """``/v1/rerank``: the method is given a query and texts and gives a score for each."""

    async def handle(body: RerankRequest) -> Response:
        documents = [d if isinstance(d, str) else str(d.get("text", "")) for d in body.documents]
        scores = [float(s) for s in await calls.ask(method.call, body.query, documents)] if documents else []
        if len(scores) != len(documents):
            raise Fault(
                500, "model_failed", f"the model was given {len(documents)} documents and gave {len(scores)} scores"
            )
        order = sorted(range(len(scores)), key=lambda at: -scores[at])[: body.top_n]
        results = [
            {
                "index": at,
                "relevance_score": scores[at],
                **({"document": {"text": documents[at]}} if body.return_documents else {}),
            }
            for at in order
        ]
        return whole({**_head("rerank", model), "results": results})

    _route(app, "/v1/rerank", handle, RerankRequest, method)


def _route(app: FastAPI, path: str, handle: Any, body: type[BaseModel], method: Method) -> None:
    handle.__annotations__ = {"body": body, "return": Response}
    about = method.call.__doc__ or None
    app.add_api_route(path, handle, methods=["POST"], summary=method.name.capitalize(), description=about)


def add_transcribe(app: FastAPI, model: Model, calls: Calls, method: Method) -> None:
    """``/v1/audio/transcriptions``: the method is given the sound's bytes and gives its text."""

    async def handle(
        file: Annotated[UploadFile, File()],
        model: Annotated[str, Form()] = "",
        language: Annotated[str | None, Form()] = None,
        prompt: Annotated[str | None, Form()] = None,
        response_format: Annotated[str, Form()] = "json",
        temperature: Annotated[float | None, Form()] = None,
    ) -> Response:
        given = {"language": language, "prompt": prompt, "temperature": temperature, "filename": file.filename}
        named = method.takes({k: v for k, v in given.items() if v is not None})
        found = await calls.ask(method.call, await file.read(), **named)
        told = cast("dict[str, Any]", found) if isinstance(found, dict) else {"text": str(found)}
        if response_format == "text":
            return Response(str(told.get("text", "")) + "\n", media_type="text/plain; charset=utf-8")
        return whole(told if response_format == "verbose_json" else {"text": told.get("text", "")})

    handle.__annotations__["file"] = Annotated[UploadFile, File()]
    handle.__annotations__["model"] = Annotated[str, Form()]
    handle.__annotations__["language"] = Annotated[str | None, Form()]
    handle.__annotations__["prompt"] = Annotated[str | None, Form()]
    handle.__annotations__["response_format"] = Annotated[str, Form()]
    handle.__annotations__["temperature"] = Annotated[float | None, Form()]
    handle.__annotations__["return"] = Response
    app.add_api_route("/v1/audio/transcriptions", handle, methods=["POST"], summary="Transcribe")
