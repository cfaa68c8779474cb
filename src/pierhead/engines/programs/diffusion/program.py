"""Loads the model in a process beside it, says so, serves until told to end."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

import uvicorn

from ..sockets import listen, notify
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
    programs = str(Path(__file__).resolve().parent.parent)
    return sys.executable, "-I", "-c", _AGAIN, json.dumps(sys.path), programs, "diffusion"


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
