"""A real gateway process, scripted engines on unix sockets and a stand-in daemon at the other end of the link."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from pierhead.config import GatewaySettings
from pierhead.gateway import link

DEADLINE = 20.0
Handler = Callable[["Call"], Awaitable[None]]


class Call:
    """One request as a scripted engine got it, and the way to answer."""

    def __init__(self, head: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.body = body
        self.reader = reader
        self.writer = writer

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode().split("\r\n")[1:]
        return {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines) if k}

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def json(self, value: Any, status: int = 200) -> None:
        raw = json.dumps(value).encode()
        await self.send(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(raw)) + raw
        )

    async def sse(self) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def event(self, value: Any) -> None:
        raw = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
        await self.send(b"%x\r\n%b\r\n" % (len(raw), raw))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()


class Engine:
    """A scripted engine: ``handler`` answers each request; ``calls`` and ``connections`` tell what came."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path = path
        self.handler = handler
        self.calls: list[Call] = []
        self.connections = 0
        self.gone: asyncio.Queue[str] = asyncio.Queue()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> link.Endpoint:
        return link.Endpoint(replica=self.path.stem, socket=str(self.path))

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path), limit=1 << 26)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                call = Call(head, b"", reader, writer)
                call.body = await reader.readexactly(int(call.headers.get("content-length", "0")))
                self.calls.append(call)
                await self.handler(call)
        except (asyncio.IncompleteReadError, OSError):
            self.gone.put_nowait("closed")
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()


class Provider(Engine):
    """The same as a provider: over TCP on loopback, with TLS when ``ca`` gave it a certificate."""

    def __init__(self, folder: Path, handler: Handler, ca: trustme.CA | None, host: str = "localhost") -> None:
        super().__init__(folder / "provider", handler)
        self._pem = str(folder / "authority.pem")
        self.port = 0
        self._ssl = None
        self._host = host
        if ca is not None:
            self._ssl = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            ca.issue_cert(host).configure_cert(self._ssl)
            ca.cert_pem.write_to_path(self._pem)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 26, ssl=self._ssl)
        self.port = self._server.sockets[0].getsockname()[1]

    def remote(self, **changes: Any) -> link.Remote:
        facts: dict[str, Any] = {"provider": "p", "host": "localhost", "port": self.port, "tls": self._ssl is not None}
        facts |= {"ca_file": self._pem if self._ssl is not None else ""}
        facts["credential"] = link.Credential("authorization", "Bearer sk-of-the-provider")
        return link.Remote(**facts | changes)

    def route(self, name: str = "m", serves: tuple[str, ...] = ("chat",), **changes: Any) -> link.Route:
        """A route that leads to it; the provider calls the model ``theirs``."""
        remote = self.remote(**changes)
        socket = f"https://{remote.host}:{remote.port}"
        endpoint = link.Endpoint(f"p/{name}", socket, serves=serves, model="theirs", remote=remote)
        return link.Route(name=name, endpoints=(endpoint,))


class Answer:
    """A parsed HTTP response."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A raw client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def half_close(self) -> None:
        self.writer.write_eof()

    def close(self) -> None:
        self.writer.transport.abort()

    async def head(self) -> Answer:
        async with asyncio.timeout(DEADLINE):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines) if k}
        return Answer(int(first.split()[1]), headers, b"")

    async def answer(self, *, head_only: bool = False) -> Answer:
        answer = await self.head()
        async with asyncio.timeout(DEADLINE):
            if head_only or answer.status in (204, 304) or answer.status < 200:
                pass
            elif answer.headers.get("transfer-encoding") == "chunked":
                answer.body = b"".join([chunk async for chunk in self.chunks()])
            elif "content-length" in answer.headers:
                answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
            else:
                answer.body = await self.reader.read()
        return answer

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            async with asyncio.timeout(DEADLINE):
                size = int(await self.reader.readuntil(b"\r\n"), 16)
                data = await self.reader.readexactly(size + 2)
            if not size:
                return
            yield data[:-2]

    async def at_eof(self) -> bytes:
        async with asyncio.timeout(DEADLINE):
            with contextlib.suppress(ConnectionResetError):
                return await self.reader.read()
        return b""


class Gate:
    """A gateway process and its link."""

    def __init__(self, folder: Path, settings: GatewaySettings, version: int = 0) -> None:
        self.folder = folder
        self.settings = settings
        self.admin = folder / "admin.sock"
        self.data = folder / "data.sock"
        self.process: asyncio.subprocess.Process | None = None
        self.addresses: list[str] = []
        self.inbox: asyncio.Queue[link.ToDaemon] = asyncio.Queue()
        self.routes: tuple[link.Route, ...] = ()
        self.version = version
        self.snapshot_extra: dict[str, Any] = {}
        self._link: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._listen: asyncio.Task[None] | None = None
        self._wires: list[Wire] = []

    @property
    def port(self) -> int:
        return int(next(a for a in self.addresses if not a.startswith("unix:")).rpartition(":")[2])

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def launch(self, extra: dict[str, Any] | None = None, pass_fds: tuple[int, ...] = ()) -> None:
        config = {"settings": msgspec.to_builtins(self.settings), "socket": str(self.data)} | (extra or {})
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pierhead.gateway",
            "--admin",
            str(self.admin),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=pass_fds,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(config).encode())
        self.process.stdin.close()
        async with asyncio.timeout(DEADLINE):
            line = await self.process.stdout.readline()
        if not line:  # it refused to start
            await self.process.wait()
            return
        self.addresses = json.loads(line)["listening"]

    async def connect_link(self) -> link.Hello:
        reader, writer = await asyncio.open_unix_connection(str(self.admin), limit=1 << 24)
        self._link = reader, writer
        self._listen = asyncio.create_task(self._read_link(reader))
        hello = await self.next(link.Hello)
        assert isinstance(hello, link.Hello)
        return hello

    async def _read_link(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            self.inbox.put_nowait(msgspec.json.decode(line, type=link.ToDaemon))

    async def drop_link(self) -> None:
        assert self._link is not None
        self._link[1].transport.abort()
        if self._listen is not None:
            self._listen.cancel()
            await asyncio.gather(self._listen, return_exceptions=True)

    async def next(self, kind: type[Any]) -> Any:
        """The next message of ``kind`` from the gateway."""
        async with asyncio.timeout(DEADLINE):
            while True:
                message = await self.inbox.get()
                if isinstance(message, kind):
                    return message

    def say(self, message: link.ToGateway) -> None:
        assert self._link is not None
        self._link[1].write(msgspec.json.encode(message) + b"\n")

    async def serve(self, *routes: link.Route, **extra: Any) -> None:
        """Send a snapshot and wait until it holds."""
        self.version += 1
        self.snapshot_extra = extra or self.snapshot_extra
        marker = link.Route(name=f"marker-{self.version}")
        self.say(link.Snapshot(version=self.version, routes=(*routes, marker), **self.snapshot_extra))
        async with asyncio.timeout(DEADLINE):
            while True:
                answer = await self.ask("GET", f"/v1/models/{marker.name}", unix=True)
                if answer.status == 200:
                    return
                await asyncio.sleep(0)

    async def wire(self, *, unix: bool = False, limit: int = 1 << 24) -> Wire:
        if unix:
            reader, writer = await asyncio.open_unix_connection(str(self.data), limit=limit)
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        wire = Wire(reader, writer)
        self._wires.append(wire)
        return wire

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        unix: bool = False,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        wire = await self.wire(unix=unix)
        try:
            await wire.send(request(method, path, body, headers))
            return await wire.answer(head_only=method == "HEAD")
        finally:
            wire.close()

    async def stop(self) -> str:
        """End the process and return what it said on stderr."""
        for wire in self._wires:
            wire.close()
        if self._link is not None:
            await self.drop_link()
        assert self.process is not None
        assert self.process.stderr is not None
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(DEADLINE):
                _, raw = await self.process.communicate()
        except TimeoutError:
            self.process.kill()
            raise
        return raw.decode()


def request(method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> bytes:
    """A request as bytes; ``body`` is bytes or something to send as JSON."""
    raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "localhost"} | (headers or {})
    if body is not None:
        lines |= {"content-type": "application/json", "content-length": str(len(raw))}
    head = "".join(f"{k}: {v}\r\n" for k, v in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + raw


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short folder for sockets."""
    with tempfile.TemporaryDirectory(prefix="gateway-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
async def new_engine(folder: Path) -> AsyncIterator[Callable[..., Awaitable[Engine]]]:
    """Start scripted engines."""
    engines: list[Engine] = []

    async def start(handler: Handler, name: str = "") -> Engine:
        engine = Engine(folder / f"{name or f'e{len(engines)}'}.sock", handler)
        await engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        await engine.stop()


@pytest.fixture
def authority() -> trustme.CA:
    """Whom a test's providers have their certificates of."""
    return trustme.CA()


@pytest.fixture
async def new_provider(folder: Path, authority: trustme.CA) -> AsyncIterator[Callable[..., Awaitable[Provider]]]:
    """Start scripted providers."""
    providers: list[Provider] = []

    async def start(handler: Handler, *, tls: bool = True, host: str = "localhost") -> Provider:
        sub = folder / f"p{len(providers)}"
        sub.mkdir()
        provider = Provider(sub, handler, authority if tls else None, host)
        await provider.start()
        providers.append(provider)
        return provider

    yield start
    for provider in providers:
        await provider.stop()


@pytest.fixture
async def new_gate(folder: Path) -> AsyncIterator[Callable[..., Awaitable[Gate]]]:
    """Start gateway processes; each must end without complaint."""
    gates: list[Gate] = []

    async def start(*, extra: dict[str, Any] | None = None, link_up: bool = True, **settings: Any) -> Gate:
        settings.setdefault("listen", ("127.0.0.1:0",))
        sub = folder / f"g{len(gates)}"
        sub.mkdir()
        gate = Gate(sub, GatewaySettings(**settings))
        await gate.launch(extra)
        gates.append(gate)
        if link_up:
            await gate.connect_link()
        return gate

    yield start
    for gate in gates:
        said = await gate.stop()
        assert "Traceback" not in said, said


@pytest.fixture
async def gate(new_gate: Callable[..., Awaitable[Gate]]) -> Gate:
    """A gateway with the usual settings, its link up."""
    return await new_gate()


@pytest.fixture
def http() -> Callable[..., bytes]:
    """``request`` above."""
    return request


@pytest.fixture
def chat() -> dict[str, Any]:
    """A chat request for the model ``m``."""
    return {"messages": [{"role": "user", "content": "hi"}], "model": "m"}


@pytest.fixture
def sockets() -> Callable[[Gate], tuple[tuple[str, ...], list[int]]]:
    """Ask for the listening sockets as a daemon does, on a link of its own."""

    def take(gate: Gate) -> tuple[tuple[str, ...], list[int]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(str(gate.admin))
            sock.sendall(msgspec.json.encode(link.HandOver()) + b"\n")
            raw, fds = b"", list[int]()
            while b'"sockets"' not in raw or not raw.endswith(b"\n"):
                data, got, _, _ = socket.recv_fds(sock, 65536, 16)
                raw += data
                fds += got
            line = next(part for part in raw.split(b"\n") if b'"sockets"' in part)
            message = msgspec.json.decode(line, type=link.Sockets)
            for fd in fds:
                os.set_inheritable(fd, True)
            return message.addresses, fds

    return take


@pytest.fixture
def talks() -> Handler:
    """A chat engine of few words, whole and streamed."""

    async def answer(call: Call) -> None:
        if not json.loads(call.body).get("stream"):
            said = {"role": "assistant", "content": "Ahoy"}
            usage = {"prompt_tokens": 5, "completion_tokens": 1}
            await call.json({"choices": [{"index": 0, "finish_reason": "stop", "message": said}], "usage": usage})
            return
        await call.sse()
        for word in ("Ahoy", " there"):
            await call.event({"choices": [{"index": 0, "delta": {"content": word}}]})
        await call.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await call.event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})
        await call.event(b"[DONE]")
        await call.end()

    return answer


@pytest.fixture
def lock() -> Callable[..., dict[str, Any]]:
    """The part of a snapshot that makes these texts keys, each its own id."""

    def make(*names: str) -> dict[str, Any]:
        pepper = bytes(16)
        keys = tuple(link.Key(id=n, mac=hmac.digest(pepper, n.encode(), hashlib.sha256).hex()) for n in names)
        return {"keys": keys, "pepper": pepper.hex()}

    return make
