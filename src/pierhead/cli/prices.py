"""The verb that shows what models cost, by which budgets in money are counted."""

from __future__ import annotations

from typing import Any

import click

from pierhead.cli.help import Verb, json_option
from pierhead.cli.output import here, print_json, say, table
from pierhead.daemon.client import Client


@click.command(
    cls=Verb,
    examples=(
        ("pier prices", "All prices, yours first; a daemon that runs reads your file again."),
        ("pier prices gpt-4o", "The one that counts for a model."),
    ),
)
@click.argument("model", required=False)
@json_option
def prices(model: str | None, as_json: bool) -> None:
    """Show what models cost, in US dollars per million tokens.

    Budgets in money need a price for each model, 0 for a free one. Yours are in prices.toml in the settings folder.
    """
    paths = here()
    found = _known()
    if model is not None:
        import fnmatch

        found = [p for p in found if fnmatch.fnmatchcase(model, p["pattern"])][:1]
    if as_json:
        print_json(found)
        return
    rows = [
        (p["pattern"], _dollars(p["input"]), _dollars(p["cached"]), _dollars(p["output"]), p["origin"]) for p in found
    ]
    if rows:
        table(("MODELS", "INPUT", "CACHED", "OUTPUT", "FROM"), rows, right=(1, 2, 3), fold=(4,), spare=(4, 2))
    elif model is not None:
        say(f"Nobody has said what '{model}' costs. Write it into {paths.config / 'prices.toml'}:")
        say(f'  ["{model}"]\n  input = 0\n  output = 0')


def _known() -> list[dict[str, Any]]:
    """All prices, from the daemon, which reads the file again for it, or without one from the files."""
    paths = here()
    client = Client(paths)
    if client.version() is not None:
        found: list[dict[str, Any]] = client.request("GET", "/prices")
        return found
    from msgspec import to_builtins

    from pierhead.daemon.prices import info, load

    return [to_builtins(info(price, origin)) for price, origin in load(paths.config)]


def _dollars(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "-"
