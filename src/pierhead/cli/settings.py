"""The verb settings: what holds for a model and where each value comes from, and changes to models.toml."""

from __future__ import annotations

from typing import Any

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verbs, json_option, option
from pierhead.cli.output import here, print_json, say, table, warn
from pierhead.daemon.client import Client
from pierhead.errors import UsageError

_MANY = 8  # of a list are not shown one by one
_EXAMPLES = (
    ("pier settings smollm2", "Every setting that holds, and where it comes from."),
    ("pier settings set smollm2 context=4096 keep_alive=1h", "From the next start on; kept in models.toml."),
    ("pier settings set smollm2 cache-type-k=q8_0", "An engine's own parameter, by its name."),
    ("pier settings set '*' parallel=2", "For all models whose engine knows it."),
    ("pier settings unset smollm2 context", "Back to what holds without it."),
)


class Settings(Verbs):
    """A group that shows a model when its first word is none of its verbs."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = args and (args[0] in self.commands or args[0].startswith("-"))
        return super().resolve_command(ctx, args if known else ["show", *args])


@click.group(cls=Settings, examples=_EXAMPLES)
def settings() -> None:
    """Show and change the settings of a model (models.toml).

    `pier settings MODEL` shows them. A change holds when the model is started the next time.
    """


@settings.command()
@click.argument("model", shell_complete=complete_model)
@option("--all", "everything", is_flag=True, help="Also what the engine does where nobody says anything.")
@json_option
def show(model: str, everything: bool, as_json: bool) -> None:
    """Show what holds for MODEL ('*': what is said for all), and where each value comes from."""
    found = _client().request("GET", f"/settings/{model}", query={"all": everything or None})
    if as_json:
        print_json(found)
        return
    _print(found)
    if everything and not any(s["origin"] == "default" and s["where"] != "Pierhead" for s in found["settings"]):
        say(f"What the engine {found['engine'] or '-'} does by itself is in its own documentation only.")


@settings.command("set")
@click.argument("model", shell_complete=complete_model)
@click.argument("settings", nargs=-1, required=True, metavar="NAME=VALUE…")
@json_option
def set_settings(model: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Set settings of MODEL, or ('*') of all models, in models.toml, whose other lines stay as they are.

    engine, runtime, keep_alive, pin, replicas, the common settings of engines, and every parameter of MODEL's engine.
    """
    _change(model, {"set": dict(map(_pair, settings))}, as_json)


@settings.command()
@click.argument("model", shell_complete=complete_model)
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@json_option
def unset(model: str, names: tuple[str, ...], as_json: bool) -> None:
    """Take settings of MODEL out of models.toml."""
    _change(model, {"unset": list(names)}, as_json)


def _client() -> Client:
    client = Client(here())
    client.ensure_daemon()
    return client


def _pair(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise UsageError(f"'{word}' is not NAME=VALUE", hint="For example: pier settings set smollm2 context=4096")
    return name, value


def _change(model: str, change: dict[str, Any], as_json: bool) -> None:
    made = _client().request("PATCH", f"/settings/{model}", change)
    if as_json:
        print_json(made)
        return
    say(f"Written to {made['file']}.")
    if made["running"]:
        warn(f"{made['model']} runs as it was started; `pier stop {made['model']}` lets the next start take it.")


def _print(found: dict[str, Any]) -> None:
    if found["error"]:
        warn(f"{found['error']['message']}. The last good settings stay in force.")
    rows = [(s["name"], _text(s["value"]), s["where"], _over(s)) for s in found["settings"]]
    table(("SETTING", "VALUE", "FROM", "INSTEAD OF"), rows, fold=(1, 2, 3))
    if found["pending"]:
        warn(f"{found['model']} runs with others until its next start: {', '.join(found['pending'])}.")
    if not rows:
        say("Nothing is set for all models. `pier settings set '*' NAME=VALUE` does it.")


def _over(setting: dict[str, Any]) -> str:
    return ", ".join(f"{_text(o['value'])} ({o['origin']})" for o in setting["over"])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if not isinstance(value, list) or len(value) <= _MANY else f"{len(value)} values"  # pyright: ignore[reportUnknownArgumentType]
