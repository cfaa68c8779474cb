"""Verbs about the disk: df, prune; they need no daemon."""

from __future__ import annotations

from typing import Any

import click

from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import open_store
from pierhead.cli.output import here, pairs, print_json, say, size, warn


@click.command(cls=Verb)
@json_option
def df(as_json: bool) -> None:
    """Show where the disk space goes."""
    store = open_store(here())
    usage = store.usage()
    if as_json:
        print_json(_plain(usage))
        return
    pairs(
        [
            ("Store", str(store.root)),
            ("Models", f"{size(usage.blobs)} in {len(usage.models)}"),
            ("Interrupted pulls", size(usage.ingests)),
            ("Reclaimable", size(usage.reclaimable) + (" (pier prune)" if usage.reclaimable else "")),
            ("Total", size(usage.total)),
            ("Free on disk", size(usage.free)),
        ]
    )
    if usage.linked_outside:
        warn(f"{size(usage.linked_outside)} of it are links to your own files.")


@click.command(
    cls=Verb,
    examples=(
        ("pier prune --dry-run", "What would go, and how many bytes that gives back."),
        ("pier prune --keep 1", "Keep one earlier version of each name to go back to."),
    ),
)
@option("--keep", type=click.IntRange(0), default=0, metavar="N", help="Earlier versions of each name that stay.")
@option("-a", "--all", "everything", is_flag=True, help="Also interrupted pulls that could go on where they stopped.")
@option("-n", "--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def prune(keep: int, everything: bool, dry_run: bool, as_json: bool) -> None:
    """Remove what no name needs: earlier versions, unnamed blobs, and what interrupted work left.

    What a running replica or a pull in progress needs stays.
    """
    done = open_store(here()).prune(keep, partials=everything, dry_run=dry_run)
    if as_json:
        print_json(done)
        return
    rows = [(name[: name.find("@") + 20], size(freed)) for name, freed in done.models.items()]
    rows += [(what, size(n)) for what, n in (("unnamed", done.unnamed), ("interrupted", done.partials)) if n]
    if rows:
        pairs(rows)
    say(f"{size(done.freed)} {'would be ' if dry_run else ''}freed.")


def _plain(value: Any) -> dict[str, Any]:
    import msgspec

    made: dict[str, Any] = msgspec.to_builtins(value)
    return made
