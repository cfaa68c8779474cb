"""What both kinds of servers share: JSON bodies, faults in OpenAI's shape, and metrics as Prometheus reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from .answers import fault
from .asks import Refused


async def json_body(request: Request) -> dict[str, Any]:
    """The body; Refused when it is no JSON object."""
    try:
        found: Any = json.loads(await request.body())
    except (ValueError, RecursionError) as exc:
        raise Refused("the body is not JSON") from exc
    if not isinstance(found, dict):
        raise Refused("the body must be a JSON object")
    return found  # pyright: ignore[reportUnknownVariableType]


def metrics(values: Mapping[str, float]) -> Response:
    """Values by ``NAME KIND``."""
    lines = [f"# TYPE {name}\n{name.split()[0]} {value}\n" for name, value in values.items()]
    return PlainTextResponse("".join(lines), media_type="text/plain; version=0.0.4")


async def refused(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, Refused)
    return JSONResponse(fault(exc.message, exc.param, exc.status), exc.status)


def last(exc: Exception) -> str:
    """The line of an OpenVINO error that says what is wrong; the others say where."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1] if lines else type(exc).__name__
