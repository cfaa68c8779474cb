"""The verb adopt: list and take over the models that other tools keep on this machine; it needs no daemon."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import open_store
from pierhead.cli.output import here, print_error, print_json, say, size, table
from pierhead.cli.progress import bars
from pierhead.errors import UsageError

if TYPE_CHECKING:
    from pierhead.sources.adopt import Offer, Taken, Tool
    from pierhead.store.layout import Store


@click.command(
    cls=Verb,
    examples=(
        ("pier adopt ollama", "List what Ollama has."),
        ("pier adopt ollama qwen3:0.6b", "Take one model over."),
        ("pier adopt docker --all --dry-run", "Say what would be taken over from Docker Model Runner."),
        ("pier adopt ollama --all --link", "Take all, as hard links: no second copy on any filesystem."),
    ),
)
@click.argument("tool", type=click.Choice(["ollama", "docker"]))
@click.argument("names", nargs=-1)
@option("--all", "everything", is_flag=True, help="Take every model that can be taken.")
@option("--path", metavar="FOLDER", help="Where the tool keeps its models, if not in its usual place.")
@option("--link", is_flag=True, help="Hard-link the files instead of copying them; they must not change then.")
@option("--force", is_flag=True, help="Move names that mean other models here.")
@option("--allow-unsafe", is_flag=True, help="Take models whose files would run code, too.")
@option("--dry-run", is_flag=True, help="Only say what would be done.")
@json_option
def adopt(
    tool: str,
    names: tuple[str, ...],
    everything: bool,
    path: str | None,
    link: bool,
    force: bool,
    allow_unsafe: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Take over models that another tool keeps on this machine.

    TOOL is ollama or docker (Docker Model Runner). Without NAMES and --all its models are listed. Weights are shared
    with the tool's own files where the filesystem can, and checked against their digest. Nothing in its folder changes.
    """
    if names and everything:
        raise UsageError("--all and names exclude each other", hint="Leave one of them out.")
    asked = "ollama" if tool == "ollama" else "docker"
    store = open_store(here())
    found = _listed(asked, path, store)
    if not names and not everything:
        _show(found, as_json)
        return
    wanted = _wanted(asked, found, names, force)
    if dry_run:
        _show(wanted, as_json)
        return
    taken = _take(wanted, store, link=link, force=force, allow_unsafe=allow_unsafe)
    _report(taken, as_json)


def _listed(tool: Tool, path: str | None, store: Store) -> list[Offer]:
    from pierhead.sources.adopt import folders, offers

    places = folders(tool, Path(path).expanduser() if path else None, os.environ)
    return asyncio.run(offers(tool, places, store))


def _wanted(tool: Tool, found: Sequence[Offer], names: Sequence[str], force: bool) -> list[Offer]:
    """What was asked for: by name, else all that nothing stands in the way of."""
    from pierhead.sources.adopt import chosen

    if names:
        return chosen(tool, found, names)
    for offer in found:
        if offer.reason and not (force and offer.state == "name in use"):
            say(f"Left out: {offer.name}: {offer.reason}")
    return [o for o in found if o.state in ("new", "here") or (force and o.state == "name in use")]


def _take(wanted: Sequence[Offer], store: Store, *, link: bool, force: bool, allow_unsafe: bool) -> list[Taken]:
    from pierhead.sources.adopt import take
    from pierhead.trust.gate import Gate

    gate = Gate(here().config)
    with bars() as listener:
        coming = take(
            wanted, store=store, gate=gate, listener=listener, link=link, force=force, allow_unsafe=allow_unsafe
        )
        return asyncio.run(coming)


def _show(offers: Sequence[Offer], as_json: bool) -> None:
    if as_json:
        print_json([offer.to_dict() for offer in offers])
        return
    rows = [(", ".join(o.names), size(o.size) if o.size else "", o.weights[7:19], o.state) for o in offers]
    table(("NAME", "SIZE", "WEIGHTS", "STATE"), rows, right=(1,), fold=(0,))
    for offer in offers:
        if offer.reason:
            say(f"{offer.name}: {offer.reason}")
    if not offers:
        say("There are no models.")


def _report(taken: Sequence[Taken], as_json: bool) -> None:
    """What became of each; the exit status is that of the first failure."""
    failed = [one for one in taken if one.error is not None]
    if as_json:
        print_json([one.to_dict() for one in taken])
    else:
        done = [one for one in taken if one.record is not None]
        rows = [(one.offer.name, one.record.digest[7:19]) for one in done if one.record]
        if rows:
            table(("NAME", "DIGEST"), rows, fold=(0,))
        for one in failed:
            if one.error is not None:
                say(f"{one.offer.name} was not taken over.")
                print_error(one.error, False)
        say(f"Took over {len(done)} of {len(taken)} models.")
    if failed and failed[0].error is not None:
        raise click.exceptions.Exit(failed[0].error.exit_code)
