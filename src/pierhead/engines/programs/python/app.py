"""The routes of one model: those of its methods, its health, figures and OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, cast

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from . import chat, faults, tensors, texts
from .answers import events, whole
from .batching import Batcher
from .calls import Calls
from .model import Method, Model, Unusable
from .shapes import is_tensors, shape

_BY_CURL = (b"content-type", b"application/x-www-form-urlencoded")


class Typed:
    """Takes a body for JSON, as the gateway does, where nobody told its type or ``curl -d`` told that of a form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [(name, value) for name, value in scope["headers"] if (name, value) != _BY_CURL]
            if not any(name == b"content-type" for name, _ in headers):
                scope = {**scope, "headers": [*headers, (b"content-type", b"application/json")]}
        await self._app(scope, receive, send)


def make(model: Model, calls: Calls) -> FastAPI:
    """The application; Unusable says what of the class cannot be served."""
    app = FastAPI(
        title=model.settings.name,
        description=model.about,
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.add_middleware(Typed)
    app.add_exception_handler(faults.Fault, _fault)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _broken)
    app.add_exception_handler(Exception, _broken)
    for name, method in model.methods.items():
        ROUTES[name](app, model, calls, method)
    predict = model.methods.get("predict")
    if predict is not None and "infer" not in model.methods and is_tensors(predict) and not predict.streams:
        tensors.add(app, model, calls, predict)

    @app.get("/health", include_in_schema=False)
    async def health() -> Response:
        return Response(b'{"status":"ok"}', media_type="application/json")

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        figures = (("running", calls.running), ("waiting", calls.waiting), ("calls_total", calls.done))
        lines = [f"python_model_{name} {value}\n" for name, value in figures]
        return Response("".join(lines), media_type="text/plain; version=0.0.4")

    return app


async def _fault(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, faults.Fault)
    return Response(json.dumps(exc.body()), exc.status, media_type="application/json")


async def _invalid(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    return await _fault(request, faults.invalid(exc.errors()))


async def _broken(request: Request, exc: Exception) -> Response:
    return await _fault(request, faults.of(exc))


# --- predict ----------------------------------------------------------------------------------------------------------


def _without(taken: frozenset[str]) -> type[APIRoute]:
    """A route that does not see members which are the gateway's, such as ``model``."""

    class Plain(Request):
        async def json(self) -> Any:
            found = await super().json()
            if not isinstance(found, dict):
                return found
            found = cast("dict[str, Any]", found)
            self.state.stream = found.get("stream")
            return {name: value for name, value in found.items() if name not in taken}

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            inner = super().get_route_handler()

            async def handle(request: Request) -> Response:
                return await inner(Plain(request.scope, request.receive))

            return handle

    return Route


def predict(app: FastAPI, model: Model, calls: Calls, method: Method) -> None:
    """``/v1/predict``: the arguments of ``predict`` as members of one JSON object."""
    batches = model.settings.max_batch_size > 1
    made = shape(method, batches=batches)
    batcher = batcher_of(model, calls, method) if batches else None

    async def handle(request: Request, body: Any) -> Response:
        given = made.arguments(body)
        if batcher is not None:
            (answer,) = await batcher.ask([given])
            return whole(answer)
        if not method.streams:
            return whole(await calls.ask(method.call, **given))
        pieces = calls.stream(method.call, **given)
        if getattr(request.state, "stream", None) is False:
            return whole([piece async for piece in pieces])
        return await events(pieces)

    handle.__annotations__ = {"request": Request, "body": made.body, "return": Response}
    router = APIRouter(route_class=_without(made.taken))
    kind = "text/event-stream" if method.streams else "application/json"
    answer: dict[str, Any] = {"description": "What the model gives"}
    if made.result is not None and not method.streams:
        answer["model"] = made.result
    else:
        answer["content"] = {kind: {}}
    router.add_api_route(
        "/v1/predict",
        handle,
        methods=["POST"],
        summary="Predict",
        description=f"{method.call.__doc__ or ''}\n\nThrough the gateway the member `model` names the model.".strip(),
        responses={200: answer},
    )
    app.include_router(router)


def batcher_of(model: Model, calls: Calls, method: Method) -> Batcher:
    """What collects the items of several requests for one call."""
    if method.streams:
        raise Unusable(f"{method.name} gets batches, so it must give a list, not a stream")

    async def work(items: list[Any]) -> Any:
        return await calls.ask(method.call, items)

    return Batcher(work, model.settings.max_batch_size, model.settings.batch_delay_ms / 1000)


Route = Callable[[FastAPI, Model, Calls, Method], None]
ROUTES: dict[str, Route] = {
    "predict": predict,
    "infer": tensors.add,
    "chat": chat.add_chat,
    "complete": chat.add_complete,
    "embed": texts.add_embed,
    "classify": texts.add_classify,
    "rerank": texts.add_rerank,
    "transcribe": texts.add_transcribe,
}
