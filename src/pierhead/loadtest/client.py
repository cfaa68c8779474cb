"""A small HTTP/1.1 client that notes when bytes came: kept connections, TLS, unix sockets; no redirects or proxies."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol, cast

import httptools

from pierhead.loadtest.answer import Answer
from pierhead.sockets import open_unix


@dataclass(frozen=True)
class Target:
    """Where requests go: ``socket`` (a unix socket) or host and port; ``path`` is the base of the API (``/v1``)."""

    host: str = "localhost"
    port: int = 0
    tls: bool = False
    path: str = "/v1"
    socket: str = ""
    key: str = field(default="", repr=False)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A whole request, as bytes."""
        default = 443 if self.tls else 80
        name = f"[{self.host}]" if ":" in self.host else self.host
        host = name if self.port in (0, default) else f"{name}:{self.port}"
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {host}", "User-Agent: pier-bench", "Accept: */*"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        if method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


class Parser(Protocol):
    """What is used of httptools' parser, which has no types."""

    def feed_data(self, data: bytes) -> None: ...
    def get_status_code(self) -> int: ...
    def should_keep_alive(self) -> bool: ...


class Connection(asyncio.Protocol):
    """One connection with at most one request under way."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = self._new()
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._now = 0.0
        self._type = b""
        self._framed = False
        self.open = True
        self.heard = False

    def _new(self) -> Parser:
        return cast("Parser", httptools.HttpResponseParser(cast("Any", self)))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._waiter is not None and not self._waiter.done():
            self._now = perf_counter()
            self._ends_with_the_connection()

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        self.heard = True
        if self._answer is None:
            return self.close()  # nobody asked
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._settle("not_understood", str(exc))
        if self._answer is not None and self._answer.error:  # pyright: ignore[reportUnnecessaryComparison]
            self._settle(self._answer.error)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._type = value.lower()
        elif name in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._answer is not None and status >= 200:
            self._answer.head(status, self._type)

    def on_body(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.piece(data, self._now)

    def on_message_complete(self) -> None:
        if self._answer is not None and self._parser.get_status_code() >= 200:
            self.open = self.open and self._parser.should_keep_alive()
            self._answer.end(self._now)
            self._settle("")

    def send(self, data: bytes, answer: Answer) -> asyncio.Future[None]:
        """Send a request; the future is done when ``answer`` is, in success or failure."""
        assert self._transport is not None
        self._answer, self._type, self._framed, self.heard = answer, b"", False, False
        self._waiter = self._loop.create_future()
        answer.sent = perf_counter()
        self._transport.write(data)
        return self._waiter

    def close(self) -> None:
        """Hang up, whatever is under way."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def _ends_with_the_connection(self) -> None:
        """The server left: the end of an answer without a length, or a failure."""
        answer = self._answer
        whole = answer is not None and (answer.finished or (answer.status and not answer.sse and not self._framed))
        if answer is not None and whole and not answer.error:
            answer.end(self._now)
            return self._settle("")
        self._settle("broken_off", "the server closed the connection")

    def _settle(self, error: str, reason: str = "") -> None:
        answer, self._answer = self._answer, None
        if answer is not None and error:
            answer.fail(error, reason)
            self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Pool:
    """Connections to one target, kept while they are good; what fails says so in the answer and raises nothing."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._loop = asyncio.get_running_loop()
        self._idle: list[Connection] = []
        self._ssl = ssl.create_default_context() if target.tls else None

    async def ask(self, data: bytes, answer: Answer, timeout: float) -> None:
        """Send ``data`` and fill ``answer``; ``timeout`` seconds from now it is given up."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(timeout):
                while True:
                    kept = bool(self._idle)
                    connection = self._idle.pop() if kept else await self._connect()
                    if not connection.open:
                        continue
                    await connection.send(data, answer)
                    if not (kept and answer.error == "broken_off" and not connection.heard):
                        break
                    answer.error = answer.reason = ""  # the server had closed an idle connection: that is no failure
                    answer.ended = 0.0
        except TimeoutError:
            answer.fail("timeout", f"no whole answer within {timeout:g} s")
        except (OSError, ValueError) as exc:  # ValueError: a host name that is none
            answer.fail("connect", _why(exc))
        finally:
            if connection is not None:
                self._keep(connection, answer)

    def close(self) -> None:
        """Hang up everywhere."""
        for connection in self._idle:
            connection.close()

    def _keep(self, connection: Connection, answer: Answer) -> None:
        if connection.open and answer.ended and not answer.error.startswith(("timeout", "broken", "not_")):
            self._idle.append(connection)
        else:
            connection.close()

    async def _connect(self) -> Connection:
        def make() -> Connection:
            return Connection(self._loop)

        target = self.target
        if target.socket:
            with open_unix(target.socket) as path:
                return (await self._loop.create_unix_connection(make, path))[1]
        return (await self._loop.create_connection(make, target.host, target.port, ssl=self._ssl))[1]


def _why(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate does not hold: {exc.verify_message}"
    return (exc.strerror if isinstance(exc, OSError) else "") or str(exc) or type(exc).__name__
