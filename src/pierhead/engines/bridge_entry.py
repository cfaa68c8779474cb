"""The program beside an engine that listens on a port only: it starts the engine, waits, and joins it to the socket.

Standalone on purpose (standard library only): the same text runs in a sandbox and in a container. Started as
``entry --socket PLACE --health PATH [--timeout S] -- PROGRAM ARGUMENT…``, where ``$(PORT)`` in an argument becomes the
port that the engine is to listen on, and ``$(METRICS_PORT)`` another one, for its metrics.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys

CHUNK = 1 << 18
GRACE = 1.0  # seconds that what is still being answered has when the engine is told to end


async def main() -> int:
    """Run the engine to its end; its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--health", required=True)
    parser.add_argument("--timeout", type=float, default=3600.0)
    parser.add_argument("--watch", action="store_true")  # the engine listens on the socket itself
    parser.add_argument("program", nargs="+")
    args = parser.parse_args()
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    port, metrics = free_ports(2)
    argv = [w.replace("$(PORT)", str(port)).replace("$(METRICS_PORT)", str(metrics)) for w in args.program]
    apart = any("$(METRICS_PORT)" in word for word in args.program)
    bridge = Bridge(port, metrics if apart else port)
    try:
        engine = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL)
    except OSError as exc:
        print(f"engine: {argv[0]} cannot be started: {exc.strerror}", file=sys.stderr, flush=True)  # noqa: T201
        return 127
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, engine, bridge)
    ended = asyncio.ensure_future(engine.wait())
    ready = asyncio.ensure_future(healthy(args.socket if args.watch else port, args.health, args.timeout))
    await asyncio.wait((ended, ready), return_when=asyncio.FIRST_COMPLETED)
    if not ended.done() and ready.result() and args.watch:
        notify(args.socket)
        await ended
    elif not ended.done() and ready.result():
        server = await listen(args.socket, bridge)
        notify(args.socket)
        async with server:
            await ended
    elif not ended.done():
        print(f"engine: it did not answer within {args.timeout:g} s", file=sys.stderr, flush=True)  # noqa: T201
        engine.kill()
    ready.cancel()
    code = await ended
    return code if code >= 0 else 128 - code


class Bridge:
    """Joins connections to the engine's port, and those that ask for metrics to the port of these."""

    def __init__(self, port: int, metrics: int) -> None:
        self._port = port
        self._metrics = metrics
        self._open: set[asyncio.StreamWriter] = set()

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes both ways until both sides have said all."""
        first = b"" if self._metrics == self._port else await reader.read(CHUNK)
        port = self._metrics if first.startswith(b"GET /metrics ") else self._port
        self._open.add(writer)
        try:
            await relay(reader, writer, port, first)
        finally:
            self._open.discard(writer)

    def close(self) -> None:
        """Break what is open: some engines wait for every connection before they end."""
        for writer in self._open:
            writer.transport.abort()


def end(engine: asyncio.subprocess.Process, bridge: Bridge) -> None:
    """Pass the wish to end on; the gateway has drained what mattered."""
    with contextlib.suppress(ProcessLookupError):
        engine.terminate()
    asyncio.get_running_loop().call_later(GRACE, bridge.close)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


async def healthy(port: int | str, path: str, timeout: float) -> bool:
    """Ask less and less often until the engine answers 200: it cannot tell by itself that it is ready."""
    pause = 0.02
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while not await answers(port, path):
                await asyncio.sleep(pause)
                pause = min(pause * 1.3, 0.25)
            return True
    return False


async def answers(port: int | str, path: str) -> bool:
    """Whether ``GET path`` gives 200 now."""
    writer = None
    try:
        async with asyncio.timeout(10):
            reader, writer = await (
                asyncio.open_unix_connection(port)
                if isinstance(port, str)
                else asyncio.open_connection("127.0.0.1", port)
            )
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            line = await reader.readline()
            return line.split(b" ", 2)[1:2] == [b"200"]
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()


async def listen(place: str, bridge: Bridge) -> asyncio.Server:
    """On a unix socket, or on ``address:port`` where a socket file cannot reach whoever asks."""
    if place.startswith("/"):
        return await asyncio.start_unix_server(bridge.join, place, limit=CHUNK, backlog=1024)
    host, _, outer = place.rpartition(":")
    return await asyncio.start_server(bridge.join, host, int(outer), limit=CHUNK, backlog=1024)


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, first: bytes = b"") -> None:
    """Bytes both ways, of which ``first`` is here, until both sides have said all; a broken side breaks the other."""
    try:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port, limit=CHUNK)
    except OSError:
        writer.transport.abort()
        return
    try:
        inner_writer.write(first)
        async with asyncio.TaskGroup() as both:
            both.create_task(copy(reader, inner_writer))
            both.create_task(copy(inner_reader, writer))
    except* OSError:
        writer.transport.abort()
    finally:
        for one in (inner_writer, writer):
            one.close()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What is read is written, as it comes, no faster than it is taken."""
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


def notify(path: str) -> None:
    """Tell whoever started this that the engine answers (as systemd's services do)."""
    if not path.startswith("/"):
        return  # nobody can be told
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
        out.sendto(b"READY=1", os.path.join(os.path.dirname(path), "notify.sock"))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
