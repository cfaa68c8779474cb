"""Verbs about the disk: df, prune, fsck; they need no daemon."""

from __future__ import annotations

from typing import Any

import click

from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import open_store
from pierhead.cli.output import here, pairs, print_json, say, size, table, warn


@click.command(cls=Verb)
@option("-v", "--verbose", is_flag=True, help="Also each model: what is its own, and what it shares with others.")
@json_option
def df(verbose: bool, as_json: bool) -> None:
    """Show where the disk space goes."""
    store = open_store(here())
    usage = store.usage()
    shares = store.shares()
    if as_json:
        print_json({**_plain(usage), "shares": [_plain(share) for share in shares]})
        return
    if verbose:
        rows = [(_short(s.name), size(s.size), size(s.unique), size(s.shared), _linked(s.linked)) for s in shares]
        table(("MODEL", "SIZE", "OWN", "SHARED", ""), rows, right=(1, 2, 3), fold=(0,))
        click.echo("")
    earlier = [share for share in shares if not share.names]
    pairs(
        [
            ("Store", str(store.root)),
            ("Models", f"{size(usage.blobs)} in {len(usage.models)}"),
            ("Earlier versions", f"{size(sum(s.unique for s in earlier))} in {len(earlier)}"),
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
    rows = [(_short(name), size(freed)) for name, freed in done.models.items()]
    rows += [(what, size(n)) for what, n in (("unnamed", done.unnamed), ("interrupted", done.partials)) if n]
    if rows:
        pairs(rows)
    say(f"{size(done.freed)} {'would be ' if dry_run else ''}freed.")


@click.command(
    cls=Verb,
    examples=(
        ("pier fsck --quick", "Sizes only: cut files, missing ones, linked files that changed."),
        ("pier fsck --repair", "Put away what is damaged; the commands that fetch it again are shown."),
    ),
)
@option("--quick", is_flag=True, help="Compare sizes; hash nothing.")
@option("--repair", is_flag=True, help="Remove damaged blobs, and names of models that cannot be read any more.")
@json_option
def fsck(quick: bool, repair: bool, as_json: bool) -> None:
    """Check that all models in the store are whole, to the byte.

    The exit status is 0 when they are, or were repaired, and 5 when something is damaged.
    """
    from pierhead.cli.progress import bars
    from pierhead.events import PullProgress
    from pierhead.store.fsck import advice, worst

    store = open_store(here())
    with bars() as listener:

        def report(digest: str, done: int, total: int) -> None:
            listener(PullProgress(name="Check", file=digest[7:19], done=done, total=total))

        found = store.fsck(report, quick=quick, repair=repair)
    if found and not repair:
        for one in found if not as_json else ():
            click.echo(f"{one.digest[:19]} is {one.kind}: {', '.join(_short(n) for n in one.names)}")
        raise worst(found)
    if as_json:
        print_json({"damage": found, "repaired": repair and bool(found)})
        return
    for one in found:
        click.echo(f"{one.digest[:19]} was {one.kind}: {', '.join(_short(n) for n in one.names)}")
        say(f"  Type `{advice(one)}`.")
    say("Put away." if found else "All models are whole.")


def _short(name: str) -> str:
    head, at, digest = name.partition("@sha256:")
    return f"{head}{at}{digest[:12]}"


def _linked(count: int) -> str:
    return f"{size(count)} are links to your files" if count else ""


def _plain(value: Any) -> dict[str, Any]:
    import msgspec

    made: dict[str, Any] = msgspec.to_builtins(value)
    return made
