"""Loads a model's class, says so, and serves it until told to end."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys

import uvicorn
from uvloop import new_event_loop

from ..sockets import listen, notify
from . import faults
from .app import make
from .calls import Calls
from .model import Settings, Unusable, bring


def main() -> int:
    """Run the server; its exit status. Why it could not start is the last line of the log."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--settings", required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    settings = Settings(**json.loads(args.settings))
    folder = os.path.realpath(args.model_dir)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serve(settings, folder, args.socket))
    except Unusable as exc:
        print(f"engine: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    except BaseException as exc:  # the last stop of this program: the reason goes to its log
        if isinstance(exc, SystemExit) and not exc.code:
            exc = RuntimeError("the model ended the program while it was loaded")
        faults.log(exc)
        where = faults.place(exc, folder)
        print(f"engine: {faults.last_line(exc)}" + (f" ({where})" if where else ""), file=sys.stderr, flush=True)  # noqa: T201
        return 1
    return 0


async def serve(settings: Settings, folder: str, place: str) -> None:
    """Load, listen, tell, and go on."""
    calls = Calls(settings.concurrency)
    model = await bring(settings, folder, calls)
    app = make(model, calls)
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=3600)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # pyright: ignore[reportAttributeAccessIssue]  # ours is simpler
    sock = listen(place)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup([sock])
    notify(place)
    await server.main_loop()


def end(_signal: int, _frame: object) -> None:
    """Leave at once: the gateway has drained what mattered."""
    os._exit(0)
