"""One small HTTP question to an engine, whole; not the way that clients' requests go."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from typing import Any

from pierhead.sockets import connect_unix, tcp_address

MOST = 1 << 20  # bytes of an answer that are read


async def ask(address: str, method: str, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, Any]:
    """Status and body (decoded where it is JSON, else text) of what the engine behind a socket answers.

    OSError when it cannot be reached, does not answer in time, or answers something that is no HTTP.
    """
    return await asyncio.to_thread(_ask, address, method, path, body, timeout)


def _ask(address: str, method: str, path: str, body: Any, timeout: float) -> tuple[int, Any]:
    place = tcp_address(address)
    connection = http.client.HTTPConnection("engine", timeout=timeout)
    connection.sock = connect_unix(address, timeout) if place is None else socket.create_connection(place, timeout)
    with contextlib.closing(connection):
        sent = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, sent, {"Content-Type": "application/json", "Connection": "close"})
            response = connection.getresponse()
            text = response.read(MOST).decode("utf-8", "replace")
        except http.client.HTTPException as exc:
            raise OSError(f"the engine's answer is no HTTP: {exc!r}") from exc
    with contextlib.suppress(ValueError, RecursionError):
        return response.status, json.loads(text)
    return response.status, text
