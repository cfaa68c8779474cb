"""Verbs about names and what they pointed to: tag, history; they need no daemon."""

from __future__ import annotations

from typing import Any

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import known, open_store
from pierhead.cli.output import age, here, print_json, say, table
from pierhead.errors import NotFound
from pierhead.store.history import Move
from pierhead.store.layout import Store


@click.command(
    cls=Verb,
    examples=(
        ("pier tag smollm2 assistant", "Clients may now also ask for the model 'assistant'."),
        ("pier tag smollm2@sha256:4f2a… smollm2", "Go back to an earlier version; `pier history smollm2` shows them."),
    ),
)
@click.argument("source", shell_complete=complete_model)
@click.argument("name")
@json_option
def tag(source: str, name: str, as_json: bool) -> None:
    """Make NAME mean the model SOURCE: a name, a digest, or NAME@sha256:… for an earlier version.

    Nothing is copied. A name that meant another model moves, and what it meant becomes an earlier version of it.
    """
    store = open_store(here())
    known(store, source)
    record = store.tag(source, name)
    if as_json:
        print_json(record)
        return
    say(f"{name} is now {record.digest[:19]}.")


@click.command(
    cls=Verb,
    examples=(("pier history smollm2", "The digests to go back to with `pier tag smollm2@sha256:… smollm2`."),),
)
@click.argument("name", shell_complete=complete_model)
@option("-a", "--all", "everything", is_flag=True, help="Also when the name was looked at and had not moved.")
@json_option
def history(name: str, everything: bool, as_json: bool) -> None:
    """Show where a name pointed, since when, and whether that version is still here."""
    store = open_store(here())
    found = store.history(name)
    if not found:
        known(store, name)  # says what is there instead
        raise NotFound(f"nothing is known of the past of '{name}'", hint="`pier list` shows the models in the store.")
    moves = [_told(store, move) for move in found if everything or as_json or move.was != move.digest]
    if as_json:
        print_json(moves)
        return
    rows = [
        (
            age(m["time"]),
            m["digest"][7:19] or "removed",
            m["by"] if m["moved"] else f"{m['by']} (unchanged)",
            m["state"],
            m["source"],
        )
        for m in moves
    ]
    table(("WHEN", "DIGEST", "BY", "STATE", "FROM"), rows, fold=(4,))


def _told(store: Store, move: Move) -> dict[str, Any]:
    """A move with ``state``: current, here (an earlier version) or gone."""
    state = ""
    if move.digest:
        try:
            found = store.get(f"{move.name}@{move.digest}")
        except NotFound:
            state = "gone"
        else:
            state = "current" if move.name in found.names else "here"
    return {
        "time": move.time,
        "name": move.name,
        "digest": move.digest,
        "was": move.was,
        "by": move.by,
        "source": move.source,
        "moved": move.was != move.digest,
        "state": state,
    }
