"""A streamed chat completion over the gateway's unix socket; no terminal, no history."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any, cast

from pierhead.errors import DaemonUnavailable, EngineFailed, PierError, UsageError
from pierhead.paths import Paths
from pierhead.sockets import connect_unix

MAX_LINE = 4 << 20


class Stream:
    """One answer on its way; iterate for its events, ``close`` stops the engine's work."""

    def __init__(self, paths: Paths, body: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("localhost")
        try:
            self._connection.sock = connect_unix(paths.gateway_socket)
        except OSError as exc:
            raise DaemonUnavailable("the gateway does not answer", hint=f"See {paths.daemon_log}.") from exc
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}), headers)
        self._response = self._connection.getresponse()
        if self._response.status != 200:
            raise self._refusal()

    def _refusal(self) -> PierError:
        data = self._response.read(1 << 20)
        self.close()
        try:
            raw: dict[str, Any] = json.loads(data)["error"]
        except (ValueError, KeyError, TypeError):
            return EngineFailed(f"the gateway answered HTTP {self._response.status}")
        return failure(raw, self._response.status)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The decoded events; raises the error that an engine sends in mid-stream."""
        while line := self._response.readline(MAX_LINE):
            if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                continue
            event: dict[str, Any] = json.loads(line[5:])
            if "error" in event:
                raise failure(event["error"], 502)
            yield event

    def close(self) -> None:
        """Hang up; the engine stops."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._response.close()
        self._connection.close()


def failure(raw: Any, status: int) -> PierError:
    """The error of an OpenAI envelope."""
    if not isinstance(raw, dict):
        return EngineFailed("the answer broke off")
    entry = cast("dict[str, Any]", raw)
    text = str(entry.get("message") or "the request failed")
    hint = entry.get("hint")
    if entry.get("code") == "context_length_exceeded":
        return UsageError(text, hint="Shorten the prompt, or give --context a larger number.")
    kind = UsageError if 400 <= status < 500 else EngineFailed
    return kind(text, hint=hint if isinstance(hint, str) else None)
