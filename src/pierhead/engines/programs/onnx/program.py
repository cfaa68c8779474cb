"""The program: loads the model, says so, serves until told to end; one readable line when it cannot."""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ..sockets import listen, notify
from . import tensors
from .answers import Answers
from .batching import Batcher, Item
from .faults import Unusable
from .folder import Folder
from .graph import Graph, load
from .metrics import Metrics
from .protocol import Protocol
from .server import Server
from .settings import Settings
from .tasks import Texts, fixed
from .words import Text, Words


def main() -> int:
    """Exit status 1 with ``engine: REASON`` when the model cannot be served."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--settings", required=True)
    args = parser.parse_args()
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime would report to its makers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a pool of threads for each text would fight with the model's
    try:
        settings = msgspec.json.decode(args.settings, type=Settings)
        graph = load(Path(args.model_dir), settings)
        listening = listen(args.socket)
        with asyncio.Runner(loop_factory=_loop()) as runner:
            runner.run(serve(graph, settings, Path(args.model_dir), listening, args.socket))
    except Exception as exc:  # the last stop of this program: the reason goes to its log
        print(f"engine: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    return 0


def _loop() -> Any:
    return importlib.import_module("uvloop").new_event_loop


async def serve(graph: Graph, settings: Settings, folder: Path, listening: socket.socket, place: str) -> None:
    """Answer on the socket until a signal ends it."""
    uvicorn: Any = importlib.import_module("uvicorn")
    app, batchers, check = build(graph, settings, folder)
    await check()
    config = uvicorn.Config(
        app, http="httptools", ws="none", lifespan="off", access_log=False, log_level="error", timeout_keep_alive=75,
        timeout_graceful_shutdown=5, server_header=False, date_header=False, backlog=2048,
    )  # fmt: skip
    server = uvicorn.Server(config)
    notify(place)
    await server.serve(sockets=[listening])
    for batcher in batchers:
        batcher.close()


def build(graph: Graph, settings: Settings, folder: Path) -> tuple[Server, tuple[Batcher, ...], Any]:
    """The application, its batchers, and a coroutine that runs the model once so that the first client need not."""
    metrics = Metrics()
    raw = _batcher(functools.partial(tensors.run, graph), settings, metrics, settings.max_batch)
    if settings.task == "tensors":
        return Server(settings, Protocol(graph, raw, None, settings), None, metrics), (raw,), _nothing
    files = Folder(folder, settings.file)
    rows, length = fixed(graph)
    words = Words(files, min(settings.context or length, length or settings.context), offsets=settings.task == "tokens")
    texts = Texts(graph, files, settings, words.padding)
    batcher = _batcher(texts.run, settings, metrics, rows or settings.max_batch)
    answers = Answers(texts, words, batcher, metrics, settings)

    async def check() -> None:
        sample: Text = ("a", "b") if settings.task == "rerank" else "a"
        try:
            await answers.work([sample], True, lambda: False)
        except Exception as exc:
            raise Unusable(f"the model cannot work on a text: {exc}") from exc

    return Server(settings, Protocol(graph, raw, answers, settings, rows), answers, metrics), (raw, batcher), check


async def _nothing() -> None:
    """A model of plain tensors cannot be tried: nobody knows what it takes."""


def _batcher(run: Callable[[list[Item]], list[Any]], settings: Settings, metrics: Metrics, rows: int) -> Batcher:
    return Batcher(
        run,
        metrics=metrics,
        max_batch=rows,
        max_tokens=settings.max_batch_tokens,
        delay=settings.delay,
        queue=settings.queue,
        workers=settings.workers,
    )
