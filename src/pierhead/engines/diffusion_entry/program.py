"""Loads the model in a process beside it, says so, serves until told to end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
from pathlib import Path

import uvicorn

from . import painter
from .faults import Unusable
from .server import Api
from .settings import Settings, read
from .worker import Worker

_AGAIN = """
import json, runpy, sys
sys.path[:] = json.loads(sys.argv.pop(1))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> int:
    """Its exit status; 1 with ``engine: REASON`` when the model cannot be served."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", default="")
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--settings", required=True)
    parser.add_argument("--paint", action="store_true")
    args = parser.parse_args()
    if args.paint:
        return painter.main(args.model_dir, args.settings)
    own = ("--paint", "--model-dir", args.model_dir, "--settings", args.settings)
    try:
        return asyncio.run(serve(read(args.settings), (*_itself(), *own), args.socket))
    except (Unusable, OSError, TypeError, ValueError) as exc:
        print(f"engine: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        return 1


def _itself() -> tuple[str, ...]:
    """The command of this program again, which finds its packages where this one did (in a container: not Python's)."""
    return sys.executable, "-I", "-c", _AGAIN, json.dumps(sys.path), str(Path(__file__).resolve().parent)


async def serve(settings: Settings, command: tuple[str, ...], place: str) -> int:
    """Answer on the socket until a signal ends it, or the painter cannot be had again."""
    listening = listen(place)
    worker = Worker(command, settings.queue)
    await worker.start()
    server = uvicorn.Server(
        uvicorn.Config(
            Api(worker, settings).app(),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
            lifespan="off",
        )
    )
    notify(place)
    watch = asyncio.create_task(_ends(worker, server))
    try:
        await server.serve(sockets=[listening])
    finally:
        watch.cancel()
        await worker.stop()
    if worker.reason:
        raise Unusable(worker.reason)
    return 0


async def _ends(worker: Worker, server: uvicorn.Server) -> None:
    await worker.broken.wait()
    server.should_exit = True


def listen(place: str) -> socket.socket:
    """A unix socket, or ``address:port`` where a socket file cannot reach whoever asks."""
    if place.startswith("/"):
        made = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place)
        made.bind(place)
    else:
        host, _, port = place.rpartition(":")
        made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host.strip("[]"), int(port)))
    made.listen(1024)
    return made


def notify(place: str) -> None:
    """Tell whoever started this that the model is loaded and the socket listens (as systemd's services do)."""
    if not place.startswith("/"):
        return  # nobody can be told
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
        out.sendto(b"READY=1", os.path.join(os.path.dirname(place), "notify.sock"))
