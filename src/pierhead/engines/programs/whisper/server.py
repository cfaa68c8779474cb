"""The ASGI application: bodies within bounds, paths to answers, streams of events, faults in OpenAI's shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from . import answers, asks
from .asks import Ask
from .faults import Failed, Refused
from .hall import Hall
from .metrics import Metrics
from .settings import Settings
from .whisper import Segment

JSON = b"application/json"
PATHS = {"/v1/audio/transcriptions": False, "/v1/audio/translations": True}  # to whether English is wanted
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


class Server:
    """Answers for one model. All bodies together stay below four times the largest one."""

    def __init__(self, settings: Settings, hall: Hall, metrics: Metrics, *, multilingual: bool) -> None:
        self._settings = settings
        self._hall = hall
        self._metrics = metrics
        self._multilingual = multilingual
        self._held = 0
        self._room = 4 * settings.max_body

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request (the server library asks for nothing else)."""
        began, posted = time.perf_counter(), scope["method"] == "POST"
        try:
            if posted:
                status = await self._posted(scope, receive, send)
            else:
                body, kind = self._got(scope["path"], scope["method"])
                status = await respond(send, 200, body, kind)
        except Refused as refused:
            status = await respond(send, refused.status, fault(refused), JSON)
        if posted:
            self._metrics.answered(status, time.perf_counter() - began)

    def _got(self, path: str, method: str) -> tuple[bytes, bytes]:
        if method not in ("GET", "HEAD"):
            raise Refused(405, f"{method[:20]} is not answered.", "method_not_allowed")
        if path == "/health":
            return b'{"status":"ok"}', JSON
        if path == "/metrics":
            return self._metrics.render(), b"text/plain; version=0.0.4; charset=utf-8"
        if path == "/v1/models":
            card = {"id": self._settings.name, "object": "model", "created": 0, "owned_by": "whisper"}
            return answers.encode({"object": "list", "data": [card]}), JSON
        raise _unknown(path)

    async def _posted(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> int:
        if scope["path"] not in PATHS:
            raise _unknown(scope["path"])
        kind = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"content-type"), "")
        held = [0]
        try:
            ask = await self._ask(await self._body(receive, held), kind, PATHS[scope["path"]])
            client = _Client(receive)
            try:
                if ask.stream:
                    return await self._stream(ask, client.gone, send)
                body, kind_of = answers.whole(await self._hall.hear(ask, client.gone), ask)
            except (Failed, MemoryError) as exc:
                raise _failure(exc) from exc
            finally:
                client.forget()
            return await respond(send, 200, body, kind_of)
        finally:
            self._held -= held[0]

    async def _ask(self, body: bytes, kind: str, translate: bool) -> Ask:
        """Read in a thread: a form may be large."""
        return await asyncio.to_thread(
            asks.read, body, kind, self._settings, translate=translate, multilingual=self._multilingual
        )

    async def _stream(self, ask: Ask, gone: Callable[[], bool], send: Send) -> int:
        """Events as segments are found; what is refused before the first one has a status of its own."""
        loop, found = asyncio.get_running_loop(), asyncio.Queue[Segment | None]()
        work = loop.create_task(
            self._hall.hear(ask, gone, lambda segment: loop.call_soon_threadsafe(found.put_nowait, segment) and None)
        )
        work.add_done_callback(lambda _: found.put_nowait(None))
        sent = 0
        while (segment := await found.get()) is not None:
            if not sent:
                await _begin(send)
            await _more(send, answers.delta(segment, ask, first=not sent))
            sent += 1
        try:
            heard = await work
        except (Refused, Failed, MemoryError) as exc:
            if not sent:
                raise
            refused = exc if isinstance(exc, Refused) else _failure(exc)
            await _more(send, b"event: error\ndata: " + fault(refused) + b"\n\n", last=True)
            return refused.status
        if not sent:
            await _begin(send)
        await _more(send, answers.done(heard, ask), last=True)
        return 200

    async def _body(self, receive: Receive, held: list[int]) -> bytes:
        """The whole body; Refused 413 when it is too large, 503 when all together are."""
        pieces: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(499, "The client is gone.", "gone")
            piece = message.get("body", b"")
            held[0] += len(piece)
            self._held += len(piece)
            if held[0] > self._settings.max_body:
                most = self._settings.max_body >> 20
                raise Refused(
                    413, f"The body is larger than {most} MiB (the setting max_body_mb).", "too_large", "file"
                )
            if self._held > self._room:
                raise Refused(503, "Too many large requests at a time.", "unavailable")
            pieces.append(piece)
            if not message.get("more_body"):
                return b"".join(pieces)


async def respond(send: Send, status: int, body: bytes, kind: bytes) -> int:
    """A whole answer; its status."""
    headers: Headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    return status


async def _begin(send: Send) -> None:
    headers: Headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _more(send: Send, data: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": not last})


class _Client:
    """Whether whoever asked is still there; the server library is only told while somebody listens."""

    def __init__(self, receive: Receive) -> None:
        self._left = False
        self._watch = asyncio.get_running_loop().create_task(self._listen(receive))

    async def _listen(self, receive: Receive) -> None:
        self._left = (await receive())["type"] == "http.disconnect"

    def gone(self) -> bool:
        """From any thread."""
        return self._left

    def forget(self) -> None:
        self._watch.cancel()


def _failure(exc: Exception) -> Refused:
    return Refused(500, f"The engine could not work through the sound: {exc}.", "engine_error")


def _unknown(path: str) -> Refused:
    known = ", ".join(("/health", "/metrics", "/v1/models", *PATHS))
    return Refused(404, f"This model does not answer {path[:100]}; it answers {known}.", "not_found")


def fault(refused: Refused) -> bytes:
    """An error as OpenAI's clients expect it."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    told = {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}
    return answers.encode({"error": told})
