#!/usr/bin/env python3
"""What ``pier bench`` itself can do on one core, against a server in another process that only writes."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
from multiprocessing.synchronize import Event

import uvloop

from harness import arguments, report
from pierhead.loadtest.client import Target
from pierhead.loadtest.plan import Load, Plan
from pierhead.loadtest.prompts import Shape
from pierhead.loadtest.session import Trial, run

PIECES = 32


def answer(pieces: int) -> bytes:
    """A whole stream of so many pieces, as engines write them."""
    event = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":128,"completion_tokens":%d}}\n\n' % pieces
    chunks = [event] * pieces + [usage, b"data: [DONE]\n\n"]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"


class Writer(asyncio.Protocol):
    """Answers each request at once; bodies are told from heads by their length alone."""

    def __init__(self, data: bytes) -> None:
        self._data, self._buffer = data, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            at = self._buffer.find(b"Content-Length: ")
            size = int(self._buffer[at + 16 : self._buffer.find(b"\r", at)]) if 0 <= at < end else 0
            if len(self._buffer) < end + 4 + size:
                return
            self._buffer = self._buffer[end + 4 + size :]
            self._transport.write(self._data)  # type: ignore[attr-defined]


def serve(path: str, pieces: int, ready: Event) -> None:
    """The server's process."""

    async def main() -> None:
        data = answer(pieces)
        await asyncio.get_running_loop().create_unix_server(lambda: Writer(data), path)
        ready.set()
        await asyncio.Event().wait()

    uvloop.run(main())


def measure(pieces: int, seconds: float) -> tuple[float, float]:
    """Answers for each second of the generator's own processor time, and for each second that passed."""
    with tempfile.TemporaryDirectory(prefix="load-", dir="/tmp") as folder:
        path, ready = f"{folder}/s", multiprocessing.Event()
        server = multiprocessing.Process(target=serve, args=(path, pieces, ready), daemon=True)
        server.start()
        try:
            assert ready.wait(20)
            plan = Plan((Load(concurrency=32),), rounds=1, seconds=seconds)
            trial = Trial(Target(socket=path), "m", plan, Shape(128, pieces), "chat")
            measured = uvloop.run(run(trial, lambda seen: None, lambda text: None)).passes[0]
        finally:
            server.terminate()
            server.join()
    assert not measured.failed
    count = len(measured.answers)
    return count / (measured.cpu * measured.seconds), count / measured.seconds


def main() -> int:
    """Answers of one piece and of 32."""
    args = arguments(__doc__ or "")
    seconds = 2.0 if args.quick else 10.0
    found = {pieces: measure(pieces, seconds) for pieces in (1, PIECES)}
    rows = [(str(n), f"{cpu:,.0f}", f"{cpu * n:,.0f}", f"{wall:,.0f}") for n, (cpu, wall) in found.items()]
    head = ("pieces each", "answers/s of CPU", "pieces/s of CPU", "answers/s here")
    figures = {"answers_per_cpu_second": found[1][0], "pieces_per_cpu_second": found[PIECES][0] * PIECES}
    report("The load generator, 32 at once", rows, head, figures, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
