"""One answer of a Python model that takes JSON: a prediction, printed as it comes; no chat."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pierhead.cli.chatapi import MAX_LINE, failure, refusal
from pierhead.cli.output import say
from pierhead.cli.progress import bars
from pierhead.errors import DaemonUnavailable, UsageError
from pierhead.paths import Paths
from pierhead.sockets import connect_unix
from pierhead.store.model import ModelRecord


def predicts(record: ModelRecord) -> bool:
    """Whether the model takes JSON and does not chat."""
    about: Any = record.metadata.get("python") or {}
    methods: Any = about.get("methods") or ()
    return record.metadata.get("format") == "python" and "predict" in methods and "chat" not in methods


def packaged(paths: Paths, path: Path) -> ModelRecord:
    """The model made of a Python file or folder on this machine, under the name of the file."""
    import os

    from pierhead.cli.models import open_store
    from pierhead.cli.package import created, python_inputs
    from pierhead.package.build import package
    from pierhead.package.recipe import Recipe

    name = path.resolve().stem.lower().replace("_", "-")
    with tempfile.TemporaryDirectory(prefix="pier-package-") as scratch, bars() as listener:
        recipe = Recipe(name, python_inputs(path, Path(scratch)), created(os.environ))
        record = package(open_store(paths), recipe, listener)
    say(f"Packaged {name}.")
    return record


def members(text: str, model: str) -> dict[str, Any]:
    """The request that was typed; UsageError unless it is a JSON object."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            f"'{model}' takes a JSON object", hint=f"Write pier run {model} '{{\"x\": 1}}', or pipe JSON into it."
        )
    return found  # pyright: ignore[reportUnknownVariableType]  # its members are anything


def predict(paths: Paths, record: ModelRecord, asked: dict[str, Any], *, as_json: bool) -> None:
    """Ask, and print: JSON as it is laid out, a stream piece by piece.

    By its digest: a name that was moved just now may mean the earlier model for a moment.
    """
    for piece in answers(paths, {**asked, "model": record.digest}):
        click.echo(json.dumps(piece, ensure_ascii=False, indent=None if as_json or not sys.stdout.isatty() else 2))


def answers(paths: Paths, body: dict[str, Any]) -> Iterator[Any]:
    """The answer, or the pieces of a stream; raises what the gateway says."""
    connection = http.client.HTTPConnection("localhost")
    with contextlib.closing(connection):
        try:
            connection.sock = connect_unix(paths.gateway_socket)
            connection.request("POST", "/v1/predict", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise refusal(response)
            if not (response.getheader("content-type") or "").startswith("text/event-stream"):
                yield json.loads(response.read())
                return
            while line := response.readline(MAX_LINE):
                if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                    piece: Any = json.loads(line[5:])
                    if isinstance(piece, dict) and "error" in piece:
                        raise failure(piece["error"], 502)
                    yield piece
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise DaemonUnavailable("the answer broke off", hint="`pier logs MODEL` shows what it said.") from exc
