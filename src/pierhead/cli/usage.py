"""The verb about who used how much; the sums are made by ``daemon.usage``, with or without a daemon."""

from __future__ import annotations

import csv
import sys
from typing import Any

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.output import duration, here, number, print_json, say, table

_FIELDS = ("requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens", "cost", "seconds")
_HEAD = ("REQUESTS", "ERRORS", "PROMPT", "CACHED", "OUTPUT", "COST", "TIME")


@click.command(
    cls=Verb,
    examples=(
        ("pier usage", "Everything so far, per key and model."),
        ("pier usage --by day --key laptop --since 7d", "One key's last seven days."),
        ("pier usage --by day,key,model --csv > usage.csv", "For a spreadsheet."),
    ),
)
@option(
    "--by", default="key,model", show_default=True, help="Any of day, key, model, revision, operation, with commas."
)
@option("--since", default="", metavar="DAY", help="From this day on (UTC): 2026-11-01, or 7d for the last seven.")
@option("--key", default="", metavar="KEY", help="Of this key only, by name or id.")
@option("--model", default="", help="Of this model only.", shell_complete=complete_model)
@option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@json_option
def usage(by: str, since: str, key: str, model: str, as_csv: bool, as_json: bool) -> None:
    """Show who used how much: requests, tokens, cost and time."""
    from msgspec import to_builtins

    from pierhead.daemon.keys import Keys
    from pierhead.daemon.usage import Usage

    paths = here()
    keys = Keys(paths.database, paths.state / "pepper")
    store = Usage(paths.state / "usage.db", paths.state / "gateway" / "usage", keys.names)
    groups = [name.strip() for name in by.split(",") if name.strip()]
    if paths.state.is_dir():
        store.fold()
        found: dict[str, Any] = to_builtins(store.report(groups, since=since, key=key, model=model))
    else:
        found = {"by": groups, "since": None, "rows": [], "total": dict.fromkeys(_FIELDS, 0)}
    if as_json:
        print_json(found)
    elif as_csv:
        _print_csv(groups, found["rows"])
    else:
        narrowed = key or model or since
        nothing = "Nothing fits; `pier usage` shows all there is." if narrowed else "Nobody has used anything yet."
        _print_table(groups, found, nothing)


def _print_csv(groups: list[str], rows: list[dict[str, Any]]) -> None:
    fields = [f for g in groups for f in ((g, "key_name") if g == "key" else (g,))] + list(_FIELDS)
    writer = csv.DictWriter(sys.stdout, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _plain(v) for k, v in row.items()} for row in rows)


def _plain(value: Any) -> Any:
    """A spreadsheet takes text that begins like a formula for one."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t") else value


def _print_table(groups: list[str], found: dict[str, Any], nothing: str) -> None:
    rows = [(*(_cell(g, row) for g in groups), *_sums(row)) for row in found["rows"]]
    if len(rows) > 1 and groups:
        rows.append(("all", *("" for _ in groups[1:]), *_sums(found["total"])))
    wide = len(groups)
    table(
        (*(g.upper() for g in groups), *_HEAD),
        rows,
        right=range(wide, wide + len(_HEAD)),
        fold=[i for i, g in enumerate(groups) if g == "model"],
        spare=[wide + i for i in (6, 3, 1, 5, 2, 4)],
    )
    if not found["rows"]:
        say(nothing)


def _cell(group: str, row: dict[str, Any]) -> str:
    if group == "key":
        return str(row["key_name"] or row["key"] or "-")
    return str(row[group] or "-")


def _sums(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        number(row["requests"]),
        number(row["errors"]),
        number(row["prompt_tokens"]),
        number(row["cached_tokens"]),
        number(row["completion_tokens"]),
        f"{row['cost']:.4f}" if row["cost"] else "-",
        duration(row["seconds"]),
    )
