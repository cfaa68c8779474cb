"""Verbs about archives: export and import of models as OCI image layouts in a tar; they need no daemon."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pierhead import events
from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verb, json_option, option
from pierhead.cli.models import known, open_store
from pierhead.cli.output import here, print_json, say, several, size
from pierhead.cli.progress import bars
from pierhead.errors import NotFound, UsageError
from pierhead.store.export import Report


@click.command(
    cls=Verb,
    examples=(
        ("pier export smollm2 -o smollm2.tar", "A file that `pier import`, skopeo and podman read."),
        ("pier export smollm2 other -o - | ssh host pier import -", "Two models to another machine."),
    ),
)
@click.argument("names", nargs=-1, required=True, shell_complete=complete_model)
@option("-o", "--output", required=True, metavar="FILE", help="The archive to write; - is standard output.")
@json_option
def export(names: tuple[str, ...], output: str, as_json: bool) -> None:
    """Write models into one archive: an OCI image layout in a tar, uncompressed.

    Signatures and other statements about the models go along. The same models give the same bytes.
    """
    from pierhead.store.export import save, send

    if output == "-" and (as_json or sys.stdout.isatty()):
        why = "--json would mix with it" if as_json else "a terminal cannot take it"
        raise UsageError(f"the archive cannot go to standard output: {why}", hint="Name a file: -o model.tar")
    if output != "-" and not Path(output).absolute().parent.is_dir():
        raise NotFound(f"there is no folder {Path(output).parent}", hint="Make it, or name another file.")
    store = open_store(here())
    for name in names:
        known(store, name)
    with bars() as listener:
        report = _report(listener, "Export")
        if output == "-":
            plan = send(store, names, sys.stdout.buffer, report)
        else:
            plan = save(store, names, Path(output), report)
    if as_json:
        print_json({"file": output, "names": names, "blobs": len(plan.blobs), "size": plan.total})
        return
    say(f"Exported {', '.join(names)}: {size(plan.total)} in {several(len(plan.blobs), 'blob')}.")


@click.command(
    "import",
    cls=Verb,
    examples=(
        ("pier import smollm2.tar", "What `pier export` or `skopeo copy … oci-archive:` wrote."),
        ("curl -s https://host/model.tar.zst | pier import - --name mine", "From a pipe; gzip and zstd are undone."),
    ),
)
@click.argument("file")
@option("--name", metavar="NAME", default="", help="What to call the model, where the archive holds one.")
@option("--allow-unsafe", is_flag=True, help="Take in a model that would run code of its author.")
@json_option
def import_(file: str, name: str, allow_unsafe: bool, as_json: bool) -> None:
    """Bring the models of an archive into the store, under the names that they have in it.

    Every byte is checked while it streams in; of an archive that is not whole nothing stays.
    """
    from pierhead.sources.archive import import_models

    store = open_store(here())
    try:
        stream = sys.stdin.buffer if file == "-" else open(file, "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError as exc:
        raise NotFound(f"there is no file {file}", hint="Check the path.") from exc
    with stream, bars() as listener:
        records = import_models(store, stream, name=name, allow_unsafe=allow_unsafe, report=_report(listener, "Import"))
    if as_json:
        print_json(records)
        return
    for record in records:
        say(f"Imported {record.name}, {size(record.size)}.")
        click.echo(record.digest)


def _report(listener: events.Listener, what: str) -> Report:
    def report(digest: str, done: int, total: int) -> None:
        listener(events.PullProgress(name=what, file=digest[7:19], done=done, total=total))

    return report
