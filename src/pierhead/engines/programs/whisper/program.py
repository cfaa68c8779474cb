"""The program: loads the model, says so, serves until told to end; one readable line when it cannot."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from ..sockets import listen, notify
from . import languages, model_file
from .hall import Hall
from .metrics import Metrics
from .server import Server
from .settings import Settings
from .whisper import Log, Model


def main() -> int:
    """Exit status 1 with ``engine: REASON`` when the model cannot be served."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--settings", required=True)
    args = parser.parse_args()
    os.environ["GGML_NO_BACKTRACE"] = "1"  # it would call a debugger when it gives up
    log = Log()
    try:
        settings = msgspec.json.decode(args.settings, type=Settings)
        folder = Path(args.model_dir)
        languages.code(settings.language)
        multilingual = model_file.check(folder / settings.file)
        vad = str(folder / settings.vad) if settings.vad else ""
        models = [
            Model(str(folder / settings.file), settings, multilingual, vad, log) for _ in range(settings.parallel)
        ]
        listening = listen(args.socket)
        with asyncio.Runner(loop_factory=_loop()) as runner:
            runner.run(serve(models, settings, listening, args.socket, multilingual=multilingual))
        for model in models:
            model.close()
    except Exception as exc:  # the last stop of this program: the reason goes to its log
        print(f"engine: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    finally:
        log.close()
    return 0


def _loop() -> Any:
    return importlib.import_module("uvloop").new_event_loop


async def serve(
    models: list[Model], settings: Settings, listening: socket.socket, place: str, *, multilingual: bool
) -> None:
    """Answer on the socket until a signal ends it."""
    uvicorn: Any = importlib.import_module("uvicorn")
    metrics = Metrics()
    hall = Hall(models, settings, metrics)
    config = uvicorn.Config(
        Server(settings, hall, metrics, multilingual=multilingual), http="httptools", ws="none", lifespan="off",
        access_log=False, log_level="error", timeout_keep_alive=75, timeout_graceful_shutdown=5, server_header=False,
        date_header=False,
    )  # fmt: skip
    server = uvicorn.Server(config)
    notify(place)
    try:
        await server.serve(sockets=[listening])
    finally:
        await asyncio.to_thread(hall.close)
