"""Verbs about routes: the names that clients send, split among models here and at providers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pierhead.cli.help import Verbs, json_option, option
from pierhead.cli.output import here, pairs, print_json, say, several, table, warn
from pierhead.daemon.client import Client
from pierhead.errors import ConfigError, UsageError


@click.group(
    cls=Verbs,
    examples=(
        ("pier route set fast --to smollm2=9 --to openai/gpt-4o-mini", "Nine of ten requests for 'fast' stay here."),
        ("pier route set safe --to smollm2 --fallback openai/gpt-4o-mini", "Ask the provider when the model fails."),
        ("pier route check", "Say what of routes.toml does not work, and why."),
    ),
)
def route() -> None:
    """Split names among models, with fallbacks and mirrors (routes.toml)."""


def _client() -> Client:
    client = Client(here())
    client.ensure_daemon()
    return client


@route.command("list")
@option("--all", "everything", is_flag=True, help="The models' own names, too.")
@json_option
def list_routes(everything: bool, as_json: bool) -> None:
    """List the names that clients may send."""
    found = _client().request("GET", "/routes")
    if as_json:
        print_json(found)
        return
    shown = [r for r in found["routes"] if everything or r["kind"] != "model"]
    rows = [(r["name"], r["kind"] if r["active"] else "not active", ", ".join(r["to"])) for r in shown]
    table(("NAME", "KIND", "TO"), rows, fold=(2,))
    if not rows:
        say(f"There are no configured routes. `pier route set` makes one, in {found['file']}.")
    _tell(found)


def _tell(found: dict[str, Any]) -> int:
    """Say what does not work; how many things those are."""
    told = [f"{r['name']}: {p}" for r in found["routes"] for p in r["problems"]] + list(found["problems"])
    if found["error"]:
        warn(f"{found['error']['message']}. The last good routes stay in force.")
    for text in told:
        warn(text)
    return len(told)


@route.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show who answers for NAME."""
    found = _client().request("GET", f"/routes/{name}")
    if as_json:
        print_json(found)
        return
    rows = [("Name", found["name"]), ("Kind", found["kind"] if found["active"] else "route, not active")]
    rows += [("To", "\n".join(found["to"]))]
    for title, value in (("Fallback", "\n".join(found["fallback"])), ("Mirror", found["mirror"])):
        rows += [(title, value)] if value else []
    rows += [("Sticky", found["sticky"])] if found["sticky"] else []
    pairs(rows)
    for problem in found["problems"]:
        warn(problem)


@route.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
def check(file: Path | None, as_json: bool) -> None:
    """Check FILE, or the routes.toml in force, against the models, keys and secrets that are here.

    A file that is not understood, or a route nobody could answer for, makes the exit status 2.
    """
    client = _client()
    if file is not None:
        found = client.request("POST", "/routes/check", {"toml": file.read_text(encoding="utf-8")})
    else:
        found = client.request("GET", "/routes")
    if found["error"]:
        raise ConfigError(found["error"]["message"], hint=found["error"]["hint"])
    if as_json:
        print_json(found)
    else:
        problems = _tell(found)
        count = sum(1 for r in found["routes"] if r["kind"] != "model")
        told = f"{several(count, 'configured name')}." if count else "There are no configured routes."
        say(told + (" All of them work." if count and not problems else ""))
    if not all(r["active"] for r in found["routes"]):
        raise click.exceptions.Exit(2)


@route.command("set")
@click.argument("name")
@option("--to", "to", multiple=True, required=True, metavar="MODEL[=WEIGHT]", help="A destination; give several.")
@option("--fallback", multiple=True, metavar="MODEL", help="Who is asked next when that fails; in this order.")
@option("--mirror", metavar="MODEL=SHARE", help="Who gets a copy of this share (0 to 1) of the requests.")
@option("--sticky", metavar="BY", help="user, conversation, key or header:NAME.")
@option("--timeout", type=click.FloatRange(0), default=0.0, metavar="SECONDS", help="To an attempt's first byte.")
@option("--replaces", is_flag=True, help="Stand in front of a model that has this name.")
@json_option
def set_route(
    name: str,
    to: tuple[str, ...],
    fallback: tuple[str, ...],
    mirror: str | None,
    sticky: str | None,
    timeout: float,
    replaces: bool,
    as_json: bool,
) -> None:
    """Write the route NAME into routes.toml, whose other lines stay as they are.

    MODEL is a model here or PROVIDER/MODEL. Conditions, budgets and providers are written in the file.
    """
    body: dict[str, Any] = {"to": [{"model": m, "weight": w} for m, w in map(_weighed, to)]}
    body |= {"fallback": [{"model": m} for m in fallback], "sticky": sticky or ""}
    body |= {"timeout": timeout, "replaces": replaces}
    if mirror:
        model, share = _weighed(mirror)
        body["mirror"] = {"model": model, "share": share}
    made = _client().request("PUT", f"/routes/{name}", body)
    if as_json:
        print_json(made)
        return
    say(f"'{name}' leads to {', '.join(made['to'])}.")
    for problem in made["problems"]:
        warn(problem)


def _weighed(text: str) -> tuple[str, float]:
    """``MODEL=NUMBER``; a model's own name may have a ``=``, so only a number at the end counts."""
    model, sign, number = text.rpartition("=")
    if not sign:
        return text, 1.0
    try:
        return model, float(number)
    except ValueError:
        raise UsageError(f"'{number}' is no number, in {text}", hint="Try --to smollm2=9.") from None


@route.command()
@click.argument("name")
@json_option
def rm(name: str, as_json: bool) -> None:
    """Take the route NAME out of routes.toml; its models stay."""
    left = _client().request("DELETE", f"/routes/{name}")
    if as_json:
        print_json(left)
        return
    say(f"The route '{name}' is gone.")
