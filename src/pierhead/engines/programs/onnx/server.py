"""The ASGI application: bodies within bounds, paths to answers, faults in the dialect of their path."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .answers import Answers, Gone, encode, unknown
from .faults import Refused
from .metrics import Metrics
from .protocol import Protocol
from .settings import Settings

JSON = b"application/json"
TEXT = 4  # bytes that one of JSON counts as: once it is read it takes more than that
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Server:
    """Answers for one model. All bodies together stay below four times the largest one."""

    def __init__(self, settings: Settings, protocol: Protocol, answers: Answers | None, metrics: Metrics) -> None:
        self._settings = settings
        self._protocol = protocol
        self._metrics = metrics
        self._paths: dict[str, Callable[[bytes, Gone], Awaitable[bytes]]] = {"/v1/predict": protocol.predict}
        self._paths |= answers.paths if answers is not None else {}
        self._held = 0
        self._room = 4 * settings.max_body

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request (the server library asks for nothing else)."""
        began = time.perf_counter()
        path = scope["path"]
        extra: tuple[tuple[bytes, bytes], ...] = ()
        kind, counted = JSON, scope["method"] == "POST"
        try:
            if counted:
                body, extra = await self._posted(path, scope, receive)
                kind = b"application/octet-stream" if extra else JSON
            else:
                body, kind = self._got(path, scope["method"])
            status = 200
        except Refused as refused:
            status, body = refused.status, fault(path, refused)
            extra = ((b"retry-after", b"1"),) if status in (429, 503) else ()
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *extra]
        if counted:
            self._metrics.answered(status, time.perf_counter() - began)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _got(self, path: str, method: str) -> tuple[bytes, bytes]:
        if method not in ("GET", "HEAD"):
            raise Refused(405, f"{method[:20]} is not answered", "method_not_allowed")
        if path == "/health":
            return b'{"status":"ok"}', JSON
        if path == "/metrics":
            return self._metrics.render(), b"text/plain; version=0.0.4; charset=utf-8"
        if path == "/v1/models":
            card = {"id": self._settings.name, "object": "model", "owned_by": "onnx"}
            return encode({"object": "list", "data": [card]}), JSON
        body = self._protocol.question(path)
        if not body:
            raise unknown(path, ["/health", "/metrics", "/v1/models", "/v2", *self._paths])
        return body, JSON

    async def _posted(
        self, path: str, scope: MutableMapping[str, Any], receive: Receive
    ) -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
        infers = path.startswith("/v2/models/") and path.endswith("/infer")
        answer = self._paths.get(path)
        if answer is None and not infers:
            raise unknown(path, [*self._paths, "/v2/models/NAME/infer"])
        held = [0]
        try:
            header = next(
                (v.decode("latin-1") for k, v in scope["headers"] if k == b"inference-header-content-length"), None
            )
            binary = infers and header is not None and header.isdecimal() and len(header) <= 12
            body = await self._body(receive, held, int(header) if binary and header else 1 << 62)
            gone = _gone(receive)
            if answer is not None:
                return await answer(body, gone), ()
            made, cut = await self._protocol.infer(body, header, gone)
            return made, ((b"inference-header-content-length", b"%d" % cut),) if cut else ()
        finally:
            self._held -= held[0]

    async def _body(self, receive: Receive, held: list[int], text: int) -> bytes:
        """The whole body, of which the first ``text`` bytes are JSON; Refused 413 when it is too large, 503 when all
        together are.
        """
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(499, "the client is gone", "gone")
            piece = message.get("body", b"")
            more = len(piece) + (TEXT - 1) * max(0, min(len(piece), text - size))
            size += len(piece)
            held[0] += more
            self._held += more
            if held[0] > (most := self._settings.max_body):
                told = f"{most} bytes, of which one of JSON counts as {TEXT}"
                raise Refused(413, f"the body is larger than {told}", "too_large")
            if self._held > self._room:
                raise Refused(503, "too many large requests at a time", "unavailable")
            pieces.append(piece)
            if not message.get("more_body"):
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _gone(receive: Receive) -> Gone:
    """Whether the client has left; uvicorn's cycle of a request knows, any other server says no."""
    cycle: Any = getattr(receive, "__self__", None)
    return lambda: bool(getattr(cycle, "disconnected", False))


def fault(path: str, refused: Refused) -> bytes:
    """An error as the clients of this path expect it."""
    if path.startswith("/v2"):
        return encode({"error": refused.message})
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    return encode({"error": {"message": refused.message, "type": kind, "code": refused.code}})
