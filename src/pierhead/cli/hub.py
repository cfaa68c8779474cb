"""The part of `pier push` that is about hubs; it needs no daemon."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pierhead import events
from pierhead.cli.output import here, say, settings, size
from pierhead.cli.progress import bars

if TYPE_CHECKING:
    from pierhead.refs import Reference
    from pierhead.store.layout import Store


def push_model_to_hub(
    store: Store,
    model: str,
    reference: Reference,
    *,
    card: str | None,
    private: bool,
    create: bool,
    message: str,
    as_json: bool,
) -> None:
    """Send a model to a hub, show how far it is, and print where it is now."""
    from pierhead.sources.publish import Options, push_to_hub

    wanted = settings(here()).settings.sources
    options = Options(Path(card).expanduser() if card else None, private, create, message)

    def run(listener: events.Listener) -> events.PushDone:
        return asyncio.run(
            push_to_hub(store, model, reference, options, settings=wanted, env=os.environ, listener=listener)
        )

    if as_json:

        def emit(event: events.AnyEvent) -> None:
            sys.stdout.write(events.encode(event).decode() + "\n")
            sys.stdout.flush()

        run(emit)
        return
    with bars() as listener:
        done = run(listener)
    say(f"Pushed {done.name}, {size(done.sent)} of large files sent.")
    click.echo(done.url)
