"""Answers as bytes: JSON of whatever a model gives, and event streams that end with an error when the model fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse
from pydantic_core import PydanticSerializationError, to_json

from . import faults

DONE = b"data: [DONE]\n\n"


def encode(value: Any) -> bytes:
    """JSON of Pydantic models, dataclasses, arrays and times; a number that JSON does not have is null."""
    try:
        return to_json(value, fallback=_plain, inf_nan_mode="null")
    except (PydanticSerializationError, ValueError, TypeError) as exc:
        raise faults.Fault(500, "model_failed", f"the model's answer cannot be written as JSON: {exc}") from exc


def _plain(value: Any) -> Any:
    """numpy's and torch's values as lists and numbers."""
    listed = getattr(value, "tolist", None)
    if callable(listed):
        return listed()
    raise TypeError(f"no JSON for {type(value).__name__}")


def whole(value: Any) -> Response:
    """An answer in one piece."""
    return Response(encode(value), media_type="application/json")


async def events(pieces: AsyncIterator[Any], shaped: Callable[[Any], Any] = lambda piece: piece) -> StreamingResponse:
    """An event stream. Its first piece is waited for, so that a model which fails at once is answered with a status."""
    try:
        first = [await anext(pieces)]
    except StopAsyncIteration:
        first = []
    except Exception as exc:
        raise faults.of(exc) from exc

    async def body() -> AsyncIterator[bytes]:
        try:
            for piece in first:
                yield b"data: " + encode(shaped(piece)) + b"\n\n"
            async for piece in pieces:
                yield b"data: " + encode(shaped(piece)) + b"\n\n"
            yield DONE
        except Exception as exc:  # the head is out: what is left is to say so in the stream
            yield b"data: " + encode(faults.of(exc).body()) + b"\n\n"
        finally:
            closing = getattr(pieces, "aclose", None)
            if closing is not None:
                await closing()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
