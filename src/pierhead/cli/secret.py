"""Verbs about secrets, such as providers' keys; their text comes from standard input and is never printed."""

from __future__ import annotations

import sys

import click
import msgspec

from pierhead.cli.help import Verbs, json_option
from pierhead.cli.output import age, here, print_json, say, table
from pierhead.daemon.secrets import Secrets


@click.group(
    cls=Verbs,
    examples=(
        ("pier secret set openai", "Ask for the text, without showing it."),
        ("pier secret set openai < key.txt", "Take it from a file."),
        ("pier secret rm openai", "Forget it; routes that need it say so."),
    ),
)
def secret() -> None:
    """Keep providers' keys for the gateway, out of files and command lines."""


def _secrets() -> Secrets:
    return Secrets(here().state / "secrets")


@secret.command("set")
@click.argument("name")
@json_option
def set_secret(name: str, as_json: bool) -> None:
    """Keep a secret as NAME; its text is read from standard input, or asked for.

    A daemon that runs takes it into use at once.
    """
    text = click.prompt("Secret", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read(1 << 20)
    info = _secrets().set(name, str(text).strip())
    if as_json:
        print_json(msgspec.to_builtins(info))
        return
    say(f"Kept as '{name}', in a file that only you can read. Name it in routes.toml: secret = \"{name}\".")


@secret.command("list")
@json_option
def list_secrets(as_json: bool) -> None:
    """List the names of what is kept."""
    found = _secrets().list()
    if as_json:
        print_json([msgspec.to_builtins(info) for info in found])
        return
    table(("NAME", "CHANGED"), [(info.name, age(info.changed)) for info in found])
    if not found:
        say("There are no secrets. `pier secret set NAME` keeps one.")


@secret.command()
@click.argument("name")
@json_option
def rm(name: str, as_json: bool) -> None:
    """Forget the secret NAME."""
    gone = _secrets().remove(name)
    if as_json:
        print_json(msgspec.to_builtins(gone))
        return
    say(f"The secret '{name}' is gone.")
