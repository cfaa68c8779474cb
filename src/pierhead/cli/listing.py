"""The verb list: the models in the store, and whether their sources have newer ones; needs no daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import open_store
from pierhead.cli.output import age, here, print_json, say, settings, size, table
from pierhead.paths import Paths
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord

if TYPE_CHECKING:
    from pierhead.sources.fresh import Freshness


@click.command(
    "list",
    cls=Verb,
    examples=(
        ("pier list 'registry.example/*'", "The names that match."),
        ("pier list --check", "Ask the sources whether they have newer versions; nothing is fetched."),
    ),
)
@click.argument("patterns", nargs=-1, shell_complete=complete_model)
@option("--check", is_flag=True, help="Ask the sources for newer versions, and remember the answers.")
@option("--stale", is_flag=True, help="Only models of which the source has another version, as far as is known.")
@option("-q", "--quiet", is_flag=True, help="Print names only.")
@json_option
def list_models(patterns: tuple[str, ...], check: bool, stale: bool, quiet: bool, as_json: bool) -> None:
    """List the models in the store, of all names or of those that match a PATTERN.

    Nobody is asked anything without --check. A state that is not known, because a source does not answer, is unknown.
    """
    paths = here()
    store = open_store(paths)
    records = [r for r in store.models() if _wanted(r, patterns)]
    answers = ask(paths, store, records) if check else {}
    known = states(store, records, answers)
    if stale:
        records = [r for r in records if known[r.digest]["state"] in ("stale", "gone")]
    if as_json:
        print_json([{**_plain(r), **known[r.digest]} for r in records])
        return
    names = [(name, r) for r in records for name in r.names if _matches(name, patterns)]
    if quiet:
        for name, _ in names:
            click.echo(name)
        return
    _show(store, names, known)
    if not names:
        say("Nothing matches." if patterns or stale else "The store is empty. Type `pier pull smollm2`.")


def ask(paths: Paths, store: Store, records: Sequence[ModelRecord]) -> dict[str, Freshness]:
    """What the sources of these models say, by digest."""
    from pierhead.sources.fresh import check
    from pierhead.sources.pull import Sources

    async def run() -> dict[str, Freshness]:
        async with Sources(settings(paths).settings.sources, paths) as sources:
            return await check(store, records, sources)

    return asyncio.run(run())


def states(store: Store, records: Sequence[ModelRecord], answers: dict[str, Freshness]) -> dict[str, dict[str, Any]]:
    """By digest: ``state`` (empty where nobody asked), ``newest`` and ``checked``, from answers and the history."""
    from pierhead.sources.fresh import stale_since

    looks = store.looks()
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        last = max((looks[n] for n in record.names if n in looks), key=lambda m: m.time, default=None)
        newest = stale_since(record, last)
        told: dict[str, Any] = {"state": "damaged" if record.damaged else "stale" if newest else "", "newest": newest}
        answer = answers.get(record.digest)
        if answer is not None and not record.damaged:
            told = {"state": answer.state, "newest": answer.pin, "reason": answer.reason}
        found[record.digest] = {**told, "checked": last.time if last else ""}
    return found


def _show(store: Store, names: Sequence[tuple[str, ModelRecord]], states: dict[str, dict[str, Any]]) -> None:
    versions = store.earlier()
    rows = [
        [
            name,
            record.digest[7:19],
            size(record.size),
            str(record.metadata.get("architecture") or ""),
            str(record.metadata.get("quantization") or ""),
            str(1 + versions.get(name, 0)),
            age(record.created),
            states[record.digest]["state"],
        ]
        for name, record in names
    ]
    head = ["NAME", "DIGEST", "SIZE", "ARCH", "QUANT", "VERSIONS", "CREATED", "STATE"]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    table(head, rows, right=(2, 5), fold=(0,), spare=(6, 3, 5, 4))
    for why in sorted({record.damaged for _, record in names} - {""}):
        say(f"Damaged: {why} Type `pier fsck --repair`.")
    reasons = {states[r.digest].get("reason", "") for _, r in names} - {""}
    for reason in sorted(reasons):
        say(f"Unknown: {reason}")
    if any(states[r.digest]["state"] == "stale" for _, r in names):
        say("`pier pull NAME` brings what is stale up to date; the version of now stays as an earlier one.")


def _wanted(record: ModelRecord, patterns: tuple[str, ...]) -> bool:
    return any(_matches(name, patterns) for name in record.names)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(name, p) or name == f"{p}:latest" for p in patterns)


def _plain(record: ModelRecord) -> dict[str, Any]:
    import msgspec

    made: dict[str, Any] = msgspec.to_builtins(record)
    return made
