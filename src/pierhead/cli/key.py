"""Verbs about API keys; the daemon keeps only a keyed hash of each."""

from __future__ import annotations

import click

from pierhead.cli.help import Verbs, json_option
from pierhead.cli.output import age, here, print_json, say, table
from pierhead.daemon.client import Client


@click.group(
    cls=Verbs,
    examples=(
        ("pier key create laptop", "Print a new key, this once; only its keyed hash is kept."),
        ("pier key revoke laptop", "It ends at once."),
    ),
)
def key() -> None:
    """Create, list and revoke API keys."""


def _client() -> Client:
    client = Client(here())
    client.ensure_daemon()
    return client


@key.command()
@click.argument("name")
@json_option
def create(name: str, as_json: bool) -> None:
    """Make a key called NAME and show it, this once."""
    made = _client().request("POST", "/keys", {"name": name})
    if as_json:
        print_json(made)
        return
    say("Keep it now; only its hash is stored.")
    click.echo(made["key"])


@key.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """List the keys that hold."""
    found = _client().request("GET", "/keys")
    if as_json:
        print_json(found)
        return
    table(("ID", "NAME", "CREATED"), [(k["id"], k["name"], age(k["created"])) for k in found])
    if not found:
        say("There are no keys. `pier key create NAME` makes one.")


@key.command()
@click.argument("key_id", metavar="ID")
@json_option
def revoke(key_id: str, as_json: bool) -> None:
    """End the key with this id or name, at once."""
    gone = _client().request("DELETE", f"/keys/{key_id}")
    if as_json:
        print_json(gone)
        return
    say(f"Key {gone['name']} ({gone['id']}) is revoked.")
