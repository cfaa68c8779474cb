"""Verbs about API keys; the daemon keeps only a keyed hash of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from pierhead.cli.help import Verbs, json_option, option
from pierhead.cli.output import age, here, number, pairs, print_json, say, table
from pierhead.daemon.client import Client

F = TypeVar("F", bound=Callable[..., Any])


@click.group(
    cls=Verbs,
    examples=(
        ("pier key create laptop", "Print a new key, this once; only its keyed hash is kept."),
        ("pier key create ci --model 'smol*' --rpm 60 --budget 1000000tokens/day", "One with bounds."),
        ("pier key edit ci --budget 5usd/month", "Change them; it holds at once."),
        ("pier key rotate ci --grace 1d", "A new key for the old one, which holds for one more day."),
        ("pier key revoke laptop", "It ends at once."),
    ),
)
def key() -> None:
    """Create, list, limit, rotate and revoke API keys."""


def _client() -> Client:
    client = Client(here())
    client.ensure_daemon()
    return client


_OPTIONS = (
    option(
        "--model",
        "models",
        multiple=True,
        metavar="PATTERN",
        section="Scopes",
        help="Only models like this, such as 'smol*'; repeatable.",
    ),
    option(
        "--dialect",
        "dialects",
        multiple=True,
        type=click.Choice(("openai", "anthropic", "ollama", "kserve")),
        section="Scopes",
        help="Only this API; repeatable.",
    ),
    option("--admin/--no-admin", default=None, section="Scopes", help="May manage Pierhead through the gateway."),
    option("--expires", metavar="WHEN", section="Scopes", help="A duration (30d), a date (2027-01-31) or never."),
    option("--rpm", type=click.IntRange(0), metavar="N", section="Limits", help="Requests per minute; 0 for no limit."),
    option("--tpm", type=click.IntRange(0), metavar="N", section="Limits", help="Tokens per minute."),
    option("--concurrent", type=click.IntRange(0), metavar="N", section="Limits", help="Requests at a time."),
    option("--priority", type=int, metavar="N", section="Limits", help="Goes before lower ones when models are busy."),
    option(
        "--budget",
        "budgets",
        multiple=True,
        metavar="BUDGET",
        section="Limits",
        help="Such as 1000000tokens/day or 5usd/month; repeatable.",
    ),
    option("--cache/--no-cache", default=None, help="Answer repeated requests from the response cache."),
)


def _grants(command: F) -> F:
    """The options that say what a key may do."""
    for add in reversed(_OPTIONS):
        command = add(command)
    return command


def _wanted(given: dict[str, Any]) -> dict[str, Any]:
    """What was said, as the control API wants it; ``--model all`` and ``--budget none`` take away."""
    wanted = {name: value for name, value in given.items() if value not in (None, ())}
    if wanted.get("budgets") == ("none",):
        wanted["budgets"] = ()
    if wanted.get("models") in (("all",), ("*",)):
        wanted["models"] = ()
    return wanted


@key.command()
@click.argument("name")
@_grants
@json_option
def create(name: str, as_json: bool, **given: Any) -> None:
    """Make a key called NAME and show it, this once."""
    _show_new(_client().request("POST", "/keys", {"name": name, **_wanted(given)}), as_json)


def _show_new(made: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    say("Keep it now; only its hash is stored.")
    click.echo(made["key"])


@key.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """List the keys that are not revoked."""
    found = _client().request("GET", "/keys")
    if as_json:
        print_json(found)
        return
    rows = [
        (k["name"], _scope(k), _limits(k), "\n".join(k["budgets"]) or "-", _expires(k), age(k["created"]), k["id"])
        for k in found
    ]
    head = ("NAME", "MAY USE", "LIMITS", "BUDGETS", "EXPIRES", "CREATED", "ID")
    table(head, rows, fold=(1,), spare=(6, 5, 4, 2, 3))
    if not found:
        say("There are no keys. `pier key create NAME` makes one.")


def _scope(k: dict[str, Any]) -> str:
    parts = [*(k["models"] or ["all models"]), *(f"by {name}" for name in k["dialects"]), *["admin"] * k["admin"]]
    return "\n".join(parts)


def _limits(k: dict[str, Any]) -> str:
    words = (("rpm", "/min"), ("tpm", " tokens/min"), ("concurrent", " at once"))
    return "\n".join(f"{number(k[name])}{unit}" for name, unit in words if k[name]) or "-"


def _expires(k: dict[str, Any]) -> str:
    return age(k["expires"]) if k["expires"] else "never"


@key.command()
@click.argument("key_id", metavar="KEY")
@json_option
def show(key_id: str, as_json: bool) -> None:
    """Show what KEY (an id or a name) may do."""
    found = _client().request("GET", f"/keys/{key_id}")
    if as_json:
        print_json(found)
        return
    _print(found)


def _print(k: dict[str, Any]) -> None:
    rows = [
        ("Id", k["id"]),
        ("Name", k["name"]),
        ("Created", age(k["created"])),
        ("Expires", _expires(k)),
        ("May use", _scope(k)),
        ("Limits", _limits(k)),
        ("Priority", str(k["priority"])),
        ("Budgets", "\n".join(map(_spent, k["spent"])) or "-"),
        ("Cache", "yes" if k["cache"] else "no"),
    ]
    if k["old_until"]:
        rows.append(("Old key", f"holds until {k['old_until']}"))
    pairs(rows)


def _spent(budget: dict[str, Any]) -> str:
    spent, left = (_amount(budget["unit"], budget[name]) for name in ("spent", "left"))
    return f"{budget['budget']}: {spent} spent, {left} left, renews {age(budget['resets'])}"


def _amount(unit: str, value: float) -> str:
    return f"${value:.6f}".rstrip("0").rstrip(".") if unit == "usd" else f"{value:,}"


@key.command()
@click.argument("key_id", metavar="KEY")
@_grants
@json_option
def edit(key_id: str, as_json: bool, **given: Any) -> None:
    """Change what KEY may do; what is not said stays.

    A list that is given replaces the one before: `--model all` and `--budget none` take it away.
    """
    changed = _client().request("PATCH", f"/keys/{key_id}", _wanted(given))
    if as_json:
        print_json(changed)
        return
    _print(changed)


@key.command()
@click.argument("key_id", metavar="KEY")
@option("--grace", metavar="DURATION", default="", help="How long the old key goes on to hold, such as 1d.")
@json_option
def rotate(key_id: str, grace: str, as_json: bool) -> None:
    """Give KEY a new text, shown this once; its id, limits and budgets stay."""
    _show_new(_client().request("POST", f"/keys/{key_id}/rotate", {"grace": grace}), as_json)


@key.command()
@click.argument("key_id", metavar="KEY")
@json_option
def revoke(key_id: str, as_json: bool) -> None:
    """End KEY (an id or a name), at once."""
    gone = _client().request("DELETE", f"/keys/{key_id}")
    if as_json:
        print_json(gone)
        return
    say(f"Key {gone['name']} ({gone['id']}) is revoked.")
