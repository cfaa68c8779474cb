"""The control API: an ASGI application over the parts of the daemon; does no work of its own."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pierhead import __version__
from pierhead.daemon import prices as pricing
from pierhead.daemon import wire
from pierhead.daemon.ollama import Ollama
from pierhead.daemon.openapi import document
from pierhead.daemon.operations import operations
from pierhead.daemon.parts import Parts
from pierhead.daemon.routefile import RouteTable
from pierhead.daemon.streams import events, log_lines, stats_lines
from pierhead.daemon.usage import UsageReport
from pierhead.errors import Conflict, NotFound, PierError, UsageError
from pierhead.events import Listener
from pierhead.fleet.info import iso
from pierhead.gateway.grants import Wanted, duration

T = TypeVar("T")
_MAX_BODY = 1 << 20
_DOCS = """<!doctype html><meta charset="utf-8"><title>Pierhead control API</title>
<style>body{font:16px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}code{background:#eee}</style>
<h1>Pierhead control API</h1><p>The whole document is <a href="/openapi.json">/openapi.json</a> (OpenAPI 3.1).</p>
<dl>%s</dl>"""


class Control:
    """The handlers; each reads a request, asks one part of the daemon and answers JSON."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    async def version(self, _: Request) -> Response:
        parts = self.parts
        return _json(wire.VersionInfo(__version__, wire.API, os.getpid(), iso(parts.started)))

    async def status(self, _: Request) -> Response:
        return _json(await self.parts.status())

    async def models(self, _: Request) -> Response:
        return _json(await asyncio.to_thread(self.parts.store.models))

    async def model(self, request: Request) -> Response:
        return _json(await asyncio.to_thread(self.parts.store.get, _name(request)))

    async def remove_model(self, request: Request) -> Response:
        store, name = self.parts.store, _name(request)
        record = await asyncio.to_thread(store.known, name)
        if self.parts.fleet.in_use(record.digest) and len(record.names) <= 1:
            raise Conflict(f"{record.name} is running", hint=f"Stop it first: `pier stop {record.name}`.")
        removed = await asyncio.to_thread(store.remove, name)
        self.parts.models_changed()
        return _json(removed)

    async def pull(self, request: Request) -> Response:
        body = await _body(request, wire.PullRequest)
        return _stream(events(lambda listener: self.parts.pull(body.reference, body.name, listener)))

    async def copy_model(self, request: Request) -> Response:
        body = await _body(request, wire.CopyRequest)
        store = self.parts.store
        await asyncio.to_thread(store.tag, body.source, body.target)
        self.parts.models_changed()
        return _json(await asyncio.to_thread(store.get, body.target))

    async def settings(self, request: Request) -> Response:
        return _json(await self.parts.models.show(_name(request), everything=_flag(request, "all")))

    async def change_settings(self, request: Request) -> Response:
        body = await _body(request, wire.SettingsChange)
        return _json(await self.parts.models.change(_name(request), body))

    async def replicas(self, _: Request) -> Response:
        return _json(self.parts.fleet.replicas())

    async def start(self, request: Request) -> Response:
        body = await _body(request, wire.StartRequest)
        model = await asyncio.to_thread(self.parts.models.base, body.model)

        async def work(listener: Listener) -> None:
            await self.parts.fleet.ensure_ready(
                model,
                runtime=body.runtime,
                settings=body.settings,
                keep_alive=body.keep_alive,
                pin=body.pin,
                replicas=body.replicas,
                listener=listener,
            )

        return _stream(events(work))

    async def stop(self, request: Request) -> Response:
        fleet, name, timeout = self.parts.fleet, _name(request), _number(request, "timeout")
        models = [r.life.model for r in fleet.find(name)]
        stopped = await fleet.stop_replica(name, timeout)
        return _json(wire.Stopped(stopped, {m.name: fleet.kept(m) for m in models}))

    async def logs(self, request: Request) -> Response:
        found = self.parts.fleet.find(_name(request))
        replica = next((r for r in reversed(found) if r.instance is not None), found[-1])
        tail = _number(request, "tail")
        lines = log_lines(replica, None if tail is None else int(tail), _flag(request, "follow"))
        return StreamingResponse(lines, media_type="text/plain; charset=utf-8")

    async def stats(self, request: Request) -> Response:
        interval = max(0.1, _number(request, "interval") or 1.0)
        return _stream(stats_lines(self.parts.fleet.all, interval, _flag(request, "once")))

    async def keys(self, _: Request) -> Response:
        return _json(await asyncio.to_thread(self.parts.keys.list))

    async def create_key(self, request: Request) -> Response:
        body = await _body(request, wire.KeyRequest)
        new = await asyncio.to_thread(self.parts.keys.create, body.name, body)
        await self.parts.keys_changed()
        return _json(new, 201)

    async def key(self, request: Request) -> Response:
        return _json(await asyncio.to_thread(self.parts.keys.get, _name(request)))

    async def edit_key(self, request: Request) -> Response:
        body = await _body(request, Wanted)
        info = await asyncio.to_thread(self.parts.keys.edit, _name(request), body)
        await self.parts.keys_changed()
        return _json(info)

    async def prices(self, _: Request) -> Response:
        return _json([pricing.info(price, origin) for price, origin in await self.parts.prices_changed()])

    async def rotate_key(self, request: Request) -> Response:
        body = await _body(request, wire.RotateRequest)
        grace = duration(body.grace) if body.grace else 0.0
        new = await asyncio.to_thread(self.parts.keys.rotate, _name(request), grace)
        await self.parts.keys_changed()
        return _json(new)

    async def revoke_key(self, request: Request) -> Response:
        gone = await asyncio.to_thread(self.parts.keys.revoke, _name(request))
        await self.parts.keys_changed()
        return _json(gone)

    async def routes(self, _: Request) -> Response:
        return _json(await self.parts.routes())

    async def route(self, request: Request) -> Response:
        return _json(_one(await self.parts.routes(), _name(request)))

    async def check_routes(self, request: Request) -> Response:
        body = await _body(request, wire.RouteText)
        return _json(await self.parts.check_routes(body.toml))

    async def set_route(self, request: Request) -> Response:
        name, body = _name(request), await _body(request, RouteTable)
        return _json(_one(await self.parts.change_route(name, body), name))

    async def remove_route(self, request: Request) -> Response:
        return _json(await self.parts.change_route(_name(request), None))

    async def usage(self, request: Request) -> Response:
        asked = {name: request.query_params.get(name, "") for name in ("since", "key", "model")}
        by = [name for name in request.query_params.get("by", "key,model").split(",") if name]

        def read() -> UsageReport:
            self.parts.usage.fold()
            return self.parts.usage.report(by, **asked)

        return _json(await asyncio.to_thread(read))

    async def shutdown(self, request: Request) -> Response:
        body = await _body(request, wire.ShutdownRequest)
        self.parts.shut_down(body.mode)
        return _json(wire.Accepted(body.mode), 202)

    async def openapi(self, _: Request) -> Response:
        return _json(document(operations(self)))

    async def docs(self, _: Request) -> Response:
        rows = (f"<dt><code>{o.method} {o.path}</code><dd>{o.summary}" for o in operations(self))
        return HTMLResponse(_DOCS % "".join(rows))


def openapi_document() -> dict[str, Any]:
    """The OpenAPI document, without a running daemon."""
    return document(operations(Control.__new__(Control)))


class Counting:
    """Counts requests that run and remembers when the last one ended, for the idle exit."""

    def __init__(self, app: ASGIApp, changed: Callable[[], None]) -> None:
        self._app = app
        self._changed = changed
        self.open = 0
        self.last = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.open -= 1
            self.last = time.monotonic()
            self._changed()


def application(parts: Parts) -> Starlette:
    """The ASGI application."""
    control = Control(parts)
    routes = [Route(o.path, o.handler, methods=[o.method]) for o in operations(control)]
    routes += Ollama(parts).routes()
    routes += [Route("/openapi.json", control.openapi), Route("/docs", control.docs)]
    return Starlette(
        routes=routes,
        exception_handlers={PierError: _failed, HTTPException: _failed, Exception: _failed},
    )


async def _failed(request: Request, exc: Exception) -> Response:
    if isinstance(exc, PierError):
        error = exc
    elif isinstance(exc, HTTPException):
        known = {404: NotFound, 405: UsageError}.get(exc.status_code, PierError)
        error = known(f"{request.method} {request.url.path}: {exc.detail}", hint="See /docs for what there is.")
        return _json({"error": error.to_dict()}, exc.status_code)
    else:
        error = PierError(f"internal error: {exc!r}", hint="See the daemon's log.")
    return _json({"error": error.to_dict()}, error.http_status)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _stream(lines: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(lines, media_type="application/x-ndjson")


async def _body(request: Request, kind: type[T]) -> T:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MAX_BODY:
            raise UsageError("the request's body is larger than 1 MiB")
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except msgspec.MsgspecError as exc:
        raise UsageError(f"the request's body is not right: {exc}", hint="See /docs for its shape.") from exc


def _one(found: wire.RouteList, name: str) -> wire.RouteInfo:
    for info in found.routes:
        if info.name == name:
            return info
    raise NotFound(f"there is no route '{name}'", hint="`pier route list` shows what there is.")


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _number(request: Request, name: str) -> float | None:
    text = request.query_params.get(name)
    try:
        value = float(text) if text else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value < 1e9:
        raise UsageError(f"'{name}' must be a number of at least 0")
    return value


def _flag(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("1", "true", "yes")
