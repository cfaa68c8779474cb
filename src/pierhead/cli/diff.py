"""The verb diff: what differs between two models, in the store or at their sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option
from pierhead.cli.inspect import look
from pierhead.cli.output import here, print_json, printable, several, size, table

if TYPE_CHECKING:
    from pierhead.store.compare import Difference, FieldChange, FileChange

_MARKS = {"same": " ", "renamed": "→", "changed": "~", "added": "+", "removed": "-"}


@click.command(
    cls=Verb,
    examples=(
        ("pier diff smollm2 smollm2@sha256:4f2a…", "What the move of a name changed."),
        ("pier diff smollm2 oci://ghcr.io/team/smollm2:next", "What a pull would change; only headers are fetched."),
    ),
)
@click.argument("first", shell_complete=complete_model)
@click.argument("second", shell_complete=complete_model)
@json_option
@click.pass_context
def diff(context: click.Context, first: str, second: str, as_json: bool) -> None:
    """Show what differs between two models: files, metadata, settings, chat template.

    Each is a model of the store or a reference, which is read at its source without pulling it. The exit status is 0
    when they are the same and 1 when they differ, as diff's.
    """
    from pierhead.store.compare import compare

    paths = here()
    found = compare(look(paths, first), look(paths, second))
    if as_json:
        print_json(found)
    else:
        _show(found)
    context.exit(0 if found.same else 1)


def _show(found: Difference) -> None:
    if found.same:
        click.echo("The same.")
        return
    rows = [(_MARKS[f.change], f.name, size(f.size), f.role, _note(f)) for f in found.files]
    table(("", "FILE", "SIZE", "ROLE", ""), rows, right=(2,), fold=(1,))
    for title, fields in (("METADATA", found.metadata), ("SETTINGS", found.settings)):
        if fields:
            click.echo("")
            table((title, "FIRST", "SECOND"), _fields(fields), fold=(1, 2))
    if found.template:
        click.echo(f"\nCHAT TEMPLATE\n{printable(found.template)}")
    click.echo(f"\n{size(found.shared)} shared, {size(found.moved)} new in the second.")


def _note(file: FileChange) -> str:
    if file.change == "renamed":
        return f"was {file.was}"
    return f"was {size(int(file.was))}" if file.change == "changed" else file.change.replace("same", "")


def _fields(fields: Sequence[FieldChange]) -> list[tuple[str, str, str]]:
    return [(f.field, _text(f.first), _text(f.second)) for f in fields]


def _text(value: Any) -> str:
    """A value in a cell; of a list or a table only how long it is, which --json shows whole."""
    if isinstance(value, list | dict):
        return several(len(cast("list[Any] | dict[str, Any]", value)), "item")
    text = "" if value is None else str(value)
    return text if len(text) <= 200 else f"{text[:197]}…"
