"""The program beside vLLM's server: starts it on the replica's socket, says when it answers and, in a line, why not.

Standalone on purpose (standard library only): the same text runs in a sandbox and in a container. Started as
``entry --socket PLACE --work FOLDER -- ARGUMENT…``; the arguments are those of vLLM's own server, which runs in that
folder, so that a bare name means what is put there later. ``entry --serve`` is that server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import runpy
import signal
import socket
import sys

MODULE = "vllm.entrypoints.openai.api_server"
LINE = 1 << 20  # bytes; a longer line of the log is cut
# A line that ends a traceback, behind the name of the process that wrote it and the head of a log line.
WRONG = re.compile(
    r"^(?:\([^)]*\) )?(?:(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] )?"
    r"(?:(?P<kind>[A-Za-z_][\w.]*(?:Error|Exception|NotFound|Refused)): |\S+: error: )(?P<said>.+)"
)
HEAD = re.compile(r"^(?:\([^)]*\) )?(?:(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]*\] )?")
ECHOES = ("Engine core initialization failed", "WorkerProc initialization failed", "Engine core proc", "See root cause")


class Reason:
    """Listens to the log for what went wrong first, since all else follows from it."""

    def __init__(self) -> None:
        self.said = ""
        self._more = False

    def hear(self, line: str) -> None:
        """Take in one line."""
        if self._more:  # pydantic tells the count first and what is wrong on the lines after it
            text = HEAD.sub("", line).strip()
            if text:
                self.said = re.sub(r"^Value error, | \[type=.*$", "", text)
                self._more = not line.rstrip().endswith("]") and " " not in text
            return
        found = WRONG.match(line)
        if found is None or any(echo in found["said"] for echo in ECHOES):
            return
        kind = (found["kind"] or "").rpartition(".")[2]
        self.said = found["said"].strip()
        self._more = kind == "ValidationError"


async def main(place: str, folder: str, arguments: list[str]) -> int:
    """Run the server to its end; its exit status."""
    argv = [sys.executable, "-I", sys.argv[0], "--serve", *listening(place), *arguments]
    server = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, server)
    assert server.stdout is not None
    reason = Reason()
    ready = asyncio.ensure_future(tell_ready(place))
    await relay(server.stdout, reason)
    code = await server.wait()
    told = ready.done()
    ready.cancel()
    if reason.said and not told:
        print(f"engine: {reason.said}", file=sys.stderr, flush=True)  # noqa: T201
    return code if code >= 0 else 128 - code


def listening(place: str) -> list[str]:
    """Flags for a unix socket, or for ``address:port`` where a socket file cannot reach whoever asks."""
    if place.startswith("/"):
        return ["--uds", place]
    host, _, port = place.rpartition(":")
    return ["--host", host, "--port", port]


def end(server: asyncio.subprocess.Process) -> None:
    """Pass the wish to end on; the gateway has drained what mattered."""
    with contextlib.suppress(ProcessLookupError):
        server.terminate()


async def relay(lines: asyncio.StreamReader, reason: Reason) -> None:
    """The server's log goes on to ours, line by line."""
    rest = b""
    while data := await lines.read(1 << 16):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            sys.stderr.buffer.write(line + b"\n")
            reason.hear(line.decode("utf-8", "replace"))
        sys.stderr.buffer.flush()
        rest = rest[:LINE]


async def tell_ready(place: str) -> None:
    """Ask less and less often until the server answers, then say so, as systemd's services do."""
    pause = 0.05
    while not await answers(place):
        await asyncio.sleep(pause)
        pause = min(pause * 1.2, 0.25)
    if place.startswith("/"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
            out.sendto(b"READY=1", os.path.join(os.path.dirname(place), "notify.sock"))


async def answers(place: str) -> bool:
    """Whether ``GET /health`` gives 200 now."""
    writer = None
    try:
        async with asyncio.timeout(10):
            if place.startswith("/"):
                reader, writer = await asyncio.open_unix_connection(place)
            else:
                reader, writer = await asyncio.open_connection("127.0.0.1", int(place.rpartition(":")[2]))
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            line = await reader.readline()
            return line.split(b" ", 2)[1:2] == [b"200"]
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()


def serve(arguments: list[str]) -> None:
    """vLLM's own server in this process."""
    sys.argv = [MODULE, *arguments]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
    else:
        mark = sys.argv.index("--")
        sys.exit(asyncio.run(main(sys.argv[2], sys.argv[4], sys.argv[mark + 1 :])))
