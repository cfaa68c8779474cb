"""The HTTP side: OpenAI's images, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from . import pictures
from .asks import Ask, near, read
from .faults import Gone, Refused
from .settings import Settings
from .worker import Made, Worker

_IMAGES = ("image", "image[]")


class Order(NamedTuple):
    """What is to be painted: the request, the size that was settled, and pictures to start from."""

    ask: Ask
    size: tuple[int, int]
    blobs: tuple[tuple[str, bytes], ...]

    @property
    def told(self) -> dict[str, Any]:
        """What each event says of its picture."""
        size = f"{self.size[0]}x{self.size[1]}"
        return {"size": size, "output_format": self.ask.kind, "background": "opaque", "quality": "auto"}

    async def file(self, made: Made) -> str:
        """The picture as a file, in base64."""
        data = await asyncio.to_thread(pictures.written, made, self.ask.kind, self.ask.compression, self.size)
        return base64.b64encode(data).decode()


class Api:
    """Answers requests with one painter."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self._worker = worker
        self._settings = settings
        self._requests: dict[int, int] = {}
        self._seconds = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    def app(self) -> Starlette:
        """The routes."""
        posts = {
            "/v1/images/generations": self.generate,
            "/v1/images/edits": self.edit,
            "/v1/images/variations": self.vary,
        }
        routes = [Route(path, self._counted(call), methods=["POST"]) for path, call in posts.items()]
        routes += [Route("/health", self.health), Route("/metrics", self.metrics), Route("/v1/models", self.models)]
        return Starlette(routes=routes, exception_handlers={HTTPException: _unknown})

    async def health(self, _: Request) -> Response:
        return PlainTextResponse(self._worker.reason or "ok", 503 if self._worker.reason else 200)

    async def models(self, _: Request) -> Response:
        card = {"id": self._settings.name, "object": "model", "owned_by": "stable-diffusion"}
        return JSONResponse({"object": "list", "data": [card]})

    async def metrics(self, _: Request) -> Response:
        worker = self._worker
        plain = {
            "sd_requests_running gauge": worker.running,
            "sd_requests_waiting gauge": worker.waiting,
            "sd_pictures_total counter": worker.made,
            "sd_steps_total counter": worker.steps,
            "sd_pictures_given_up_total counter": worker.given_up,
            "sd_painters_lost_total counter": worker.lost,
            "sd_painting_seconds_total counter": round(self._seconds, 3),
        }
        lines = [f"# TYPE {name}\n{name.split()[0]} {value}\n" for name, value in plain.items()]
        lines.append("# TYPE sd_requests_total counter\n")
        lines += [f'sd_requests_total{{status="{s}"}} {count}\n' for s, count in sorted(self._requests.items())]
        return PlainTextResponse("".join(lines), media_type="text/plain; version=0.0.4")

    async def generate(self, request: Request) -> Response:
        """A picture from words."""
        ask = read(await self._document(request), self._settings)
        return await self._answer(request, ask, ask.size or (self._settings.width, self._settings.height), [])

    async def edit(self, request: Request) -> Response:
        """A picture from words and another picture, all of it or where the mask lets."""
        fields, images, mask = await self._form(request)
        ask = read(fields, self._settings)
        return await self._repaint(request, ask, images, mask)

    async def vary(self, request: Request) -> Response:
        """A picture like another one."""
        fields, images, _ = await self._form(request)
        ask = read(fields, self._settings, prompt=False)
        return await self._repaint(request, ask, images, b"")

    async def _repaint(self, request: Request, ask: Ask, images: Sequence[bytes], mask: bytes) -> Response:
        by_init = self._settings.edits == "init"
        if not images:
            raise Refused("'image' is missing", "image", code="missing_required_parameter")
        if len(images) > (1 if by_init else 4):
            raise Refused(f"this model starts from one picture, not {len(images)}" if by_init else "at most 4", "image")
        size, blobs = await asyncio.to_thread(self._unpack, ask, images, mask)
        return await self._answer(request, ask, size, blobs)

    def _unpack(
        self, ask: Ask, images: Sequence[bytes], mask: bytes
    ) -> tuple[tuple[int, int], list[tuple[str, bytes]]]:
        """The size of what is to be made, and the client's pictures brought to it."""
        given = [pictures.opened(image, "image") for image in images]
        first = given[0]
        size = ask.size or near(first.colours.size, self._settings.multiple, self._settings.max_pixels)
        kind = "init" if self._settings.edits == "init" else "reference"
        blobs = [(kind, pictures.fitted(one.colours, *size)) for one in given]
        through = pictures.mask(mask, first.colours.size) if mask else first.through
        if through is not None:
            blobs.append(("mask", pictures.fitted(through, *size)))
        return size, blobs

    async def _answer(
        self, request: Request, ask: Ask, size: tuple[int, int], blobs: Sequence[tuple[str, bytes]]
    ) -> Response:
        """Paint ``n`` pictures, told at the end or as a stream."""
        order = Order(ask, size, tuple(blobs))
        if ask.stream:
            return await self._stream(request, order)
        async with _watched(request) as gone:
            data = [one async for one in self._paint(order, gone, lambda _: None)]
        told = {"created": int(time.time()), "data": data, "size": order.told["size"]}
        return JSONResponse(told | {"output_format": ask.kind, "background": "opaque"})

    async def _paint(
        self, order: Order, gone: asyncio.Event, seen: Callable[[Made], None]
    ) -> AsyncGenerator[dict[str, Any]]:
        """Each picture has the next seed, so that one of them can be made again by itself."""
        ask, size = order.ask, order.size
        for number in range(ask.n):
            job = ask.job | self._shape(size, order.blobs) | {"seed": (ask.job["seed"] + number) % (1 << 32)}
            began = time.monotonic()
            made = await self._worker.paint(job, [blob for _, blob in order.blobs], gone, seen)
            self._seconds += time.monotonic() - began
            yield {"b64_json": await order.file(made), "seed": job["seed"]}

    async def _stream(self, request: Request, order: Order) -> Response:
        """OpenAI's events; what is refused before the first of them is answered as everywhere."""
        events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        async def work() -> None:
            try:
                async with _watched(request) as gone:
                    async for one in self._paint(order, gone, lambda made: events.put_nowait(("partial", made))):
                        events.put_nowait(("completed", one))
                events.put_nowait(("end", None))
            except (Refused, Gone) as exc:
                events.put_nowait(("fail", exc))

        task = asyncio.create_task(work())  # goes on until the painter is free, also where the client leaves
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        first = await events.get()
        if first[0] == "fail":
            raise first[1]
        kind = "image_edit" if order.blobs else "image_generation"
        return StreamingResponse(_events(first, events, order, kind), media_type="text/event-stream")

    def _shape(self, size: tuple[int, int], blobs: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
        tiling = self._settings.vae_tiling
        large = size[0] * size[1] > 512 * 512
        return {
            "width": size[0],
            "height": size[1],
            "tiling": large if tiling == "auto" else tiling == "on",
            "images": [(kind, *size) for kind, _ in blobs],
        }

    # --- bodies -------------------------------------------------------------------------------------------------------

    async def _document(self, request: Request) -> Mapping[str, Any]:
        pieces: list[bytes] = []
        async for piece in self._bounded(request).stream():
            pieces.append(piece)
        try:
            found: Any = json.loads(b"".join(pieces))
        except (ValueError, RecursionError) as exc:
            raise Refused("the body is not JSON", code="invalid_json") from exc
        if not isinstance(found, dict):
            raise Refused("the body must be a JSON object", code="invalid_json")
        return found  # pyright: ignore[reportUnknownVariableType]

    async def _form(self, request: Request) -> tuple[dict[str, Any], list[bytes], bytes]:
        """The fields that are text, the pictures, and the mask."""
        fields: dict[str, Any] = {}
        images: list[bytes] = []
        mask = b""
        async with self._bounded(request).form(max_files=8, max_fields=64, max_part_size=64 << 10) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    data = await value.read()
                    if name in _IMAGES:
                        images.append(data)
                    elif name == "mask":
                        mask = data
                elif name not in ("mask", *_IMAGES):
                    fields[name] = value
                elif value:
                    raise Refused(f"'{name}' must be a file", name)
        return fields, images, mask

    def _bounded(self, request: Request) -> Request:
        """The same request, whose body may not be larger than it is allowed to be."""
        held = 0

        async def receive() -> Any:
            nonlocal held
            message = await request.receive()
            held += len(message.get("body", b""))
            if held > self._settings.max_body:
                raise Refused(f"the body is larger than {self._settings.max_body} bytes", status=413, code="too_large")
            return message

        return Request(request.scope, receive)

    def _counted(self, call: Any) -> Any:
        async def counted(request: Request) -> Response:
            try:
                answer = await call(request)
            except Refused as refused:
                answer = JSONResponse(refused.body(), refused.status)
                if refused.status in (429, 503):
                    answer.headers["retry-after"] = "5"
            except (Gone, ClientDisconnect):
                answer = Response(status_code=499)
            except HTTPException as exc:  # a form that is none
                answer = JSONResponse(Refused(str(exc.detail), code="invalid_form").body(), exc.status_code)
            self._requests[answer.status_code] = self._requests.get(answer.status_code, 0) + 1
            return answer

        return counted


async def _events(
    first: tuple[str, Any], events: asyncio.Queue[tuple[str, Any]], order: Order, kind: str
) -> AsyncGenerator[bytes]:
    """Rough pictures, at most as many as were asked for, and whole ones."""
    (what, held), rough = first, 0
    while what != "end":
        told: dict[str, Any] = {**order.told, "created_at": int(time.time())}
        if what == "completed":
            yield _event(f"{kind}.completed", told | held)
            rough = 0
        elif what == "partial" and rough < order.ask.job["partials"]:
            shown = {"b64_json": await order.file(held), "partial_image_index": rough}
            yield _event(f"{kind}.partial_image", told | shown)
            rough += 1
        elif what == "fail":
            yield _event("error", held.body() if isinstance(held, Refused) else {})
            return
        what, held = await events.get()


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


@contextlib.asynccontextmanager
async def _watched(request: Request) -> AsyncGenerator[asyncio.Event]:
    """An event that is set when the client leaves."""
    gone = asyncio.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    task = asyncio.create_task(watch())
    try:
        yield gone
    finally:
        task.cancel()


async def _unknown(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return JSONResponse(Refused(str(exc.detail), code="not_found").body(), exc.status_code)
