"""Verbs about registries: push; it needs no daemon."""

from __future__ import annotations

import asyncio
import os
import sys

import click

from pierhead import events
from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option
from pierhead.cli.models import known, open_store
from pierhead.cli.output import here, say, settings, size
from pierhead.cli.progress import bars
from pierhead.errors import BadReference
from pierhead.refs import parse


@click.command(
    cls=Verb,
    examples=(
        ("pier push smollm2 localhost:5000/team/smollm2:1.0", "To a registry of your own."),
        ("pier push smollm2 oci://ghcr.io/team/smollm2:1.0", "With the login that `docker login` keeps."),
    ),
)
@click.argument("model", shell_complete=complete_model)
@click.argument("target", required=False)
@json_option
def push(model: str, target: str | None, as_json: bool) -> None:
    """Send a model to a registry.

    TARGET is oci://host/repository:tag; without it MODEL's own name must be one. What the registry has already is not
    sent again. Logins are those of Docker's config.json. With --json each line is one event.
    """
    from pierhead.registry.name import image_name
    from pierhead.registry.publish import push_model

    paths = here()
    store = open_store(paths)
    known(store, model)
    reference = parse(target or model)
    if reference.kind not in ("oci", "short") or (reference.kind == "short" and "/" not in reference.repo):
        raise BadReference(
            f"'{target or model}' does not name a place in a registry", hint=f"pier push {model} oci://HOST/REPO:TAG"
        )
    if reference.kind == "short":
        reference = parse(f"oci://{reference}")
    wanted = settings(paths).settings.sources
    place = image_name(reference)
    if as_json:

        def emit(event: events.AnyEvent) -> None:
            sys.stdout.write(events.encode(event).decode() + "\n")
            sys.stdout.flush()

        asyncio.run(push_model(store, model, place, settings=wanted, env=os.environ, listener=emit))
        return
    with bars() as listener:
        done = asyncio.run(push_model(store, model, place, settings=wanted, env=os.environ, listener=listener))
    say(f"Pushed {done.name}, {size(done.sent)} sent." + ("" if done.sent else " The registry had everything."))
    click.echo(done.digest)
