"""A streamed chat completion over the gateway's unix socket; no terminal, no history."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any, cast

from pierhead.errors import DaemonUnavailable, EngineFailed, PierError, UsageError, from_dict
from pierhead.paths import Paths
from pierhead.sockets import connect_unix

MAX_LINE = 4 << 20


class Stream:
    """One answer on its way since ``asked`` (monotonic seconds); iterate for its events, ``close`` stops the work."""

    def __init__(self, paths: Paths, body: dict[str, Any]) -> None:
        self.asked = time.monotonic()  # the gateway's headers come with the first token
        self._connection = http.client.HTTPConnection("localhost")
        self._response: http.client.HTTPResponse | None = None
        headers = {"Content-Type": "application/json"}
        try:
            self._connection.sock = connect_unix(paths.gateway_socket)
            self._connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}), headers)
            self._response = self._connection.getresponse()
            if self._response.status != 200:
                raise refusal(self._response)
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            raise DaemonUnavailable("the gateway does not answer", hint=f"See {paths.daemon_log}.") from exc
        except BaseException:  # also Ctrl-C while the prompt is read: hanging up stops the engine
            self.close()
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The decoded events; raises the error that an engine sends in mid-stream, or that there is no end."""
        assert self._response is not None
        try:
            while line := self._response.readline(MAX_LINE):
                if not line.startswith(b"data:"):
                    continue
                if line[5:].strip() == b"[DONE]":
                    return
                event: dict[str, Any] = json.loads(line[5:])
                if "error" in event:
                    raise failure(event["error"], 502)
                yield event
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise _broken() from exc
        raise _broken()

    def close(self) -> None:
        """Hang up; the engine stops."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if self._response is not None:
            self._response.close()
        self._connection.close()


def _broken() -> EngineFailed:
    return EngineFailed("the answer broke off", hint="`pier logs MODEL` shows what the engine said; ask again.")


def refusal(response: http.client.HTTPResponse) -> PierError:
    """What an answer other than 200 means."""
    data = response.read(1 << 20)
    try:
        raw: Any = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return EngineFailed(f"the gateway answered HTTP {response.status}", hint="`pier status` shows what runs.")
    return failure(raw, response.status)


def failure(raw: Any, status: int) -> PierError:
    """The error of an OpenAI envelope; its message ends with its hint, which is taken off again."""
    if not isinstance(raw, dict):
        return _broken()
    entry = cast("dict[str, Any]", raw)
    hint = entry.get("hint") if isinstance(entry.get("hint"), str) else None
    text = str(entry.get("message") or "the request failed").removesuffix(hint or "").strip()
    if entry.get("code") == "context_length_exceeded":
        return UsageError(text, hint="Shorten the prompt, or give --context a larger number.")
    known = from_dict({"code": entry.get("code"), "message": text, "hint": hint, "data": entry})
    if known.code != PierError.code:
        return known
    kind = UsageError if 400 <= status < 500 else EngineFailed
    return kind(text, hint=hint)
