"""Loads the model, says so, serves until told to end."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import sys
from typing import Any

import uvicorn

from ..sockets import listen, notify
from .pooling import pooling
from .reads import Reads
from .server import Api
from .wire import last


class Server(uvicorn.Server):
    """Tells whoever started this when it listens (as systemd's services do)."""

    def __init__(self, config: uvicorn.Config, place: str) -> None:
        super().__init__(config)
        self._place = place

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        notify(self._place)


def main() -> int:
    """Its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--settings", required=True)
    args = parser.parse_args()
    settings: dict[str, Any] = json.loads(args.settings)
    try:
        genai: Any = importlib.import_module("openvino_genai")
        api = (
            writes(genai, args.model_dir, settings)
            if settings["task"] == "write"
            else reads(genai, args.model_dir, settings)
        )
    except Exception as exc:  # the last stop of this program: the reason goes to its log
        print(f"engine: {last(exc)}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    config = uvicorn.Config(
        api.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=1, lifespan="off"
    )
    Server(config, args.socket).run([listen(args.socket)])
    return 0


def writes(genai: Any, folder: str, settings: dict[str, Any]) -> Api:
    """A pipeline with a cache for all requests at once."""
    need(folder, "openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml")
    scheduler = genai.SchedulerConfig()
    for name, value in settings["scheduler"].items():
        setattr(scheduler, name, value)
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, settings["device"], settings["properties"])
    return Api(genai, pipeline, settings["model"], settings["context"])


def reads(genai: Any, folder: str, settings: dict[str, Any]) -> Reads:
    """A pipeline that makes vectors of texts, or that ranks them."""
    need(folder, "openvino_model.xml", "openvino_tokenizer.xml")
    kind = genai.TextRerankPipeline if settings["task"] == "rank" else genai.TextEmbeddingPipeline
    config = kind.Config()
    config.max_length = settings["context"]
    if settings["task"] == "rank":
        config.top_n = settings["max_batch"]
    else:
        how = pooling(folder, settings["pooling"], settings["normalize"])
        config.pooling_type = getattr(kind.PoolingType, how.words)
        config.normalize = how.normalize
    pipeline = kind(folder, settings["device"], config, **settings["properties"])
    pairs = {"add_second_input": True} if settings["task"] == "rank" else {}
    made = Reads(pipeline, genai.Tokenizer(folder, **pairs), settings)
    made.try_out()
    return made


def need(folder: str, *names: str) -> None:
    """FileNotFoundError with the first of these files that is not there."""
    for name in names:
        if not os.path.isfile(os.path.join(folder, name)):
            raise FileNotFoundError(f"the model has no {name}")
