"""The verb scan: whether a model's files, in the store or on disk, would run code of their author."""

from __future__ import annotations

from pathlib import Path

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option
from pierhead.cli.models import open_store
from pierhead.cli.output import here, print_json, say, table
from pierhead.errors import NotFound, UnsafeContent
from pierhead.formats.findings import Finding


@click.command(
    cls=Verb,
    examples=(
        ("pier scan smollm2", "A model of the store."),
        ("pier scan ./checkpoint.pt", "A file or a folder, before it becomes a model."),
    ),
)
@click.argument("target", metavar="MODEL|PATH", shell_complete=complete_model)
@json_option
def scan(target: str, as_json: bool) -> None:
    """Say whether a model's files would run code.

    Pickles are read instruction by instruction and templates from their syntax tree; nothing is loaded or rendered.
    Ends with status 14 when something would run code. `pier pull` does the same before a model gets its name.
    """
    found = _find(target)
    unsafe = sum(f.severity == "unsafe" for f in found)
    if as_json:
        print_json({"target": target, "safe": not unsafe, "findings": found})
    else:
        if found:
            table(("FILE", "", "FINDING"), [(f.file, f.severity, f.reason) for f in found], fold=(2,))
        say(f"{unsafe} of these run code when they are loaded." if unsafe else "Nothing here runs code.")
    if unsafe:
        raise click.exceptions.Exit(UnsafeContent.exit_code)


def _find(target: str) -> list[Finding]:
    from pierhead.formats.scan import scan_file, scan_files, scan_folder

    path = Path(target).expanduser()
    if path.is_dir():
        return scan_folder(path)
    if path.is_file():
        return scan_file(path)
    store = open_store(here())
    try:
        record = store.get(target)
    except NotFound as exc:
        raise NotFound(
            f"'{target}' is neither a model of the store nor a file", hint="`pier list` shows the models in the store."
        ) from exc
    return scan_files((f.name, store.blob_path(f.digest)) for f in record.files)
