"""Work on models as Ollama's clients watch it: events as records of status, digest and sizes; does no work itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse

from pierhead.errors import PierError, from_dict
from pierhead.events import (
    AnyEvent,
    Failed,
    Note,
    PullDone,
    PullPlanned,
    PullProgress,
    PushDone,
    PushPlanned,
    PushProgress,
)

Record = dict[str, Any]
SUCCESS: Record = {"status": "success"}


def record(event: AnyEvent) -> Record | None:
    """The record of one event; None for what Ollama's clients hear nothing of. Sizes are bytes."""
    match event:
        case PullPlanned():
            return {"status": "pulling manifest"}
        case PushPlanned():
            return {"status": "retrieving manifest"}
        case PullProgress() | PushProgress():
            verb = "pulling" if isinstance(event, PullProgress) else "pushing"
            about = event.digest.removeprefix("sha256:")[:12] or event.file
            digest = {"digest": event.digest} if event.digest else {}
            return {"status": f"{verb} {about}", **digest, "total": event.total, "completed": event.done}
        case PullDone():
            return {"status": "writing manifest"}
        case PushDone():
            return {"status": "pushing manifest"}
        case Note(message=message):
            return {"status": message}
        case Failed(error=error):
            return {"error": said(from_dict(error))}
        case _:
            return None


def said(error: PierError) -> str:
    """An error as one text."""
    text = error.message if error.message.endswith((".", "?", "!")) else f"{error.message}."
    return f"{text} {error.hint}" if error.hint else text


async def respond(told: AsyncGenerator[AnyEvent], *, stream: bool) -> Response:
    """The answer to a request for work: NDJSON, or the last record alone; an error at the start has its own status."""
    first = await anext(told, None)
    if isinstance(first, Failed) or not stream:
        return await _whole(told, first)
    return StreamingResponse(_lines(told, first), media_type="application/x-ndjson")


async def _whole(told: AsyncGenerator[AnyEvent], event: AnyEvent | None) -> Response:
    while event is not None and not isinstance(event, Failed):
        event = await anext(told, None)
    await told.aclose()
    if event is None:
        return answer(SUCCESS)
    error = from_dict(event.error)
    return answer({"error": said(error)}, error.http_status)


async def _lines(told: AsyncGenerator[AnyEvent], event: AnyEvent | None) -> AsyncGenerator[bytes]:
    try:
        while event is not None:
            found = record(event)
            if found is not None:
                yield _line(found)
            if isinstance(event, Failed):
                return
            event = await anext(told, None)
        yield _line(SUCCESS)
    finally:
        await told.aclose()


def _line(value: Record) -> bytes:
    return msgspec.json.encode(value) + b"\n"


def answer(value: Any, code: int = 200) -> Response:
    """One JSON answer."""
    return Response(msgspec.json.encode(value), code, media_type="application/json; charset=utf-8")
