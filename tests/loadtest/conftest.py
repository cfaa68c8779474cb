"""A scripted server on a unix socket or a port, which answers as a test says, and a small test against it."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pierhead.loadtest.client import Target
from pierhead.loadtest.plan import Load, Plan
from pierhead.loadtest.prompts import Shape
from pierhead.loadtest.session import Outcome, Trial, run

Script = Callable[["Request"], Awaitable[None]]


class Request:
    """One request, and the way to answer it."""

    def __init__(self, head: str, body: Any, writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.body = body
        self.writer = writer

    @property
    def path(self) -> str:
        return self.head.split(" ", 2)[1]

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    def json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.raw(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(data))
            + data
        )

    def stream(self) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def event(self, value: Any) -> None:
        data = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
        self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    def token(self, text: str = "a") -> None:
        self.event({"choices": [{"delta": {"content": text}}]})

    def end(self, prompt: int = 0, output: int = 0) -> None:
        if output:
            self.event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}})
        self.event(b"[DONE]")
        self.raw(b"0\r\n\r\n")

    def answer(self, tokens: int = 3) -> None:
        """A whole stream at once; the prompt has two tokens, and one for each word."""
        words = len(self.body["messages"][0]["content"].split())
        self.stream()
        self.event({"choices": [{"delta": {"role": "assistant", "content": None}}]})
        for _ in range(tokens):
            self.token()
        self.end(words + 2, tokens)


class Server:
    """``script`` answers each request; ``requests`` are those that came."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.connections = 0
        self.most = 0
        self._busy = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                sizes = [line.split(":")[1] for line in head.lower().splitlines() if line.startswith("content-length")]
                data = await reader.readexactly(int(sizes[0])) if sizes else b"null"
                request = Request(head, json.loads(data), writer)
                self.requests.append(request)
                self._busy += 1
                self.most = max(self.most, self._busy)
                try:
                    await self.script(request)
                finally:
                    self._busy -= 1
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


Bench = Callable[..., Awaitable[tuple[Outcome, Server]]]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Script], Awaitable[tuple[Server, Target]]]]:
    """Start scripted servers; each is a Server and the Target that leads there."""
    with tempfile.TemporaryDirectory(prefix="load-", dir="/tmp") as folder:
        started: list[tuple[asyncio.Server, Server]] = []

        async def start(script: Script) -> tuple[Server, Target]:
            server, path = Server(script), Path(folder) / f"{len(started)}.sock"
            started.append((await asyncio.start_unix_server(server.serve, str(path)), server))
            return server, Target(socket=str(path))

        yield start
        for listener, server in started:
            listener.close()
            await server.stop()


@pytest.fixture
def bench(serve: Callable[[Script], Awaitable[tuple[Server, Target]]]) -> Bench:
    """Run a small test against a script: 12 requests in one round, two at once."""

    async def go(script: Script, *loads: Load, task: str = "chat", shape: Shape | None = None, **plan: Any) -> Any:
        server, target = await serve(script)
        facts = {"rounds": 1, "requests": 12, "timeout": 5.0, "warmup": 0} | plan
        trial = Trial(target, "m", Plan(loads or (Load(concurrency=2),), **facts), shape or Shape(20, 3), task)
        async with asyncio.timeout(30):
            return await run(trial, lambda seen: None, lambda text: None), server

    return go
