"""The program beside an engine that listens on a port only: it starts the engine, waits, and joins it to the socket.

Standalone on purpose (standard library only): the same text runs in a sandbox and in a container. Started as
``entry --socket PLACE --health PATH [--timeout S] -- PROGRAM ARGUMENT…``, where ``$(PORT)`` in an argument becomes the
port that the engine is to listen on.
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


async def main() -> int:
    """Run the engine to its end; its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--health", required=True)
    parser.add_argument("--timeout", type=float, default=3600.0)
    parser.add_argument("program", nargs="+")
    args = parser.parse_args()
    port = free_port()
    argv = [word.replace("$(PORT)", str(port)) for word in args.program]
    try:
        engine = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL)
    except OSError as exc:
        print(f"engine: {argv[0]} cannot be started: {exc.strerror}", file=sys.stderr, flush=True)  # noqa: T201
        return 127
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, engine)
    ended = asyncio.ensure_future(engine.wait())
    ready = asyncio.ensure_future(healthy(port, args.health, args.timeout))
    await asyncio.wait((ended, ready), return_when=asyncio.FIRST_COMPLETED)
    if not ended.done() and ready.result():
        server = await listen(args.socket, port)
        notify(args.socket)
        async with server:
            await ended
    elif not ended.done():
        print(f"engine: it did not answer within {args.timeout:g} s", file=sys.stderr, flush=True)  # noqa: T201
        engine.kill()
    ready.cancel()
    code = await ended
    return code if code >= 0 else 128 - code


def end(engine: asyncio.subprocess.Process) -> None:
    """Pass the wish to end on; the gateway has drained what mattered."""
    with contextlib.suppress(ProcessLookupError):
        engine.terminate()


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def healthy(port: int, path: str, timeout: float) -> bool:
    """Ask less and less often until the engine answers 200: it cannot tell by itself that it is ready."""
    pause = 0.02
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while not await answers(port, path):
                await asyncio.sleep(pause)
                pause = min(pause * 1.3, 0.25)
            return True
    return False


async def answers(port: int, path: str) -> bool:
    """Whether ``GET path`` gives 200 now."""
    writer = None
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            line = await reader.readline()
            return line.split(b" ", 2)[1:2] == [b"200"]
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()


async def listen(place: str, port: int) -> asyncio.Server:
    """On a unix socket, or on ``address:port`` where a socket file cannot reach whoever asks."""

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await relay(reader, writer, port)

    if place.startswith("/"):
        return await asyncio.start_unix_server(join, place, limit=CHUNK, backlog=1024)
    host, _, outer = place.rpartition(":")
    return await asyncio.start_server(join, host, int(outer), limit=CHUNK, backlog=1024)


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    """Bytes both ways until both sides have said all; a side that breaks takes the other with it."""
    try:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port, limit=CHUNK)
    except OSError:
        writer.transport.abort()
        return
    try:
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
