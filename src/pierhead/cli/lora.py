"""The verb lora: adapters that a model has at hand, each under a name that requests may ask for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verbs, json_option, option
from pierhead.cli.models import open_store
from pierhead.cli.output import here, print_json, say, table, warn
from pierhead.daemon.client import Client
from pierhead.errors import NotFound, UsageError
from pierhead.refs import parse

_EXAMPLES = (
    ("pier lora add smollm2 ./pirate.gguf", "Put it into the store; requests name the model smollm2+pirate."),
    ("pier lora add my-model ./pirate/", "A folder as PEFT saves it, for vLLM, which loads it while it runs."),
    ("pier lora add smollm2 pirate=0.5", "Half as strong, at once if it is loaded."),
    ("pier lora list smollm2", ""),
    ("pier lora rm smollm2 pirate", "Requests cannot name it any more; its file stays in the store."),
)


@click.group(cls=Verbs, examples=_EXAMPLES)
def lora() -> None:
    """Give a model LoRA adapters that requests choose by name."""


@lora.command()
@click.argument("model", shell_complete=complete_model)
@click.argument("adapter", metavar="FILE|FOLDER|NAME[=SCALE]")
@option("--name", metavar="NAME", help="What to call a FILE's adapter [default: the file's name]")
@json_option
def add(model: str, adapter: str, name: str | None, as_json: bool) -> None:
    """Let MODEL have an adapter at hand: a GGUF file, a folder as PEFT saves one, or one that is in the store.

    Requests that name the model MODEL+NAME use it; SCALE is how strongly it counts [default: 1].
    """
    given, scale = _scaled(adapter)
    if Path(given).is_file():
        given = _brought(Path(given), name or Path(given).stem)
    elif os.sep in given and Path(given).is_dir():
        given = _brought(Path(given), name or Path(given).resolve().name)
    elif name:
        raise UsageError(f"there is no file {given}", hint="--name is for a file's adapter.")
    elif parse(given).kind == "file":
        raise NotFound(f"there is no file {given}", hint="Check the path.")
    _change(model, {"set": {"adapters": {given: scale}}}, as_json)


@lora.command("list")
@click.argument("model", shell_complete=complete_model)
@json_option
def list_adapters(model: str, as_json: bool) -> None:
    """List the adapters of MODEL, and whether what runs has loaded them."""
    found = _client().request("GET", f"/settings/{model}")
    if as_json:
        print_json(found["adapters"])
        return
    _print(found)


@lora.command()
@click.argument("model", shell_complete=complete_model)
@click.argument("name")
@json_option
def rm(model: str, name: str, as_json: bool) -> None:
    """Take the adapter NAME from MODEL: at once for requests; from memory at once, too, where its engine can."""
    _change(model, {"unset": [f"adapters.{name}"]}, as_json)


def _client() -> Client:
    client = Client(here())
    client.ensure_daemon()
    return client


def _scaled(text: str) -> tuple[str, float]:
    """``NAME=NUMBER``; a file may have a ``=`` in its name."""
    name, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError:
        raise UsageError(f"'{scale}' is no number, in {text}", hint="Try pirate=0.5.") from None


def _brought(file: Path, name: str) -> str:
    """Put a file into the store as an adapter; its name there."""
    from pierhead.package.adapter import store_adapter

    return store_adapter(open_store(here()), file, name).name


def _change(model: str, change: dict[str, Any], as_json: bool) -> None:
    made = _client().request("PATCH", f"/settings/{model}", change)
    if as_json:
        print_json(made["adapters"])
        return
    _print(made)
    if made["running"] and not all(a["loaded"] for a in made["adapters"]):
        warn(f"{made['model']} runs; `pier stop {made['model']}` lets the next request start it with all of them.")


def _print(found: dict[str, Any]) -> None:
    rows = [(a["name"], f"{a['scale']:g}", a["model"], _state(a)) for a in found["adapters"]]
    table(("ADAPTER", "SCALE", "REQUESTS NAME", "STATE"), rows, fold=(2, 3))
    if not rows:
        say(f"{found['model']} has no adapters. `pier lora add {found['model']} FILE.gguf` gives it one.")


def _state(adapter: dict[str, Any]) -> str:
    if adapter.get("error"):
        return f"refused: {adapter['error']}"
    return "loaded" if adapter["loaded"] else "at the next start"
