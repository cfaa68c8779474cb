"""Verbs about recorded requests: list, show, rm, export; reads the recordings itself, with or without a daemon."""

from __future__ import annotations

import datetime
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pierhead.cli.completion import complete_model
from pierhead.cli.help import Verbs, json_option, option
from pierhead.cli.output import age, here, number, pairs, print_json, printable, say, several, table
from pierhead.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pierhead.gateway.telemetry.records import Record, Records, Wanted

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def records() -> Records:
    """The recordings of this installation."""
    from pierhead.gateway.telemetry.records import Records

    return Records(here().state / "gateway" / "records")


def when(text: str) -> float:
    """A point in time, as ``2h`` ago or an ISO 8601 date or time, as Unix time; 0 for "". UsageError for others."""
    if not text:
        return 0.0
    if found := re.fullmatch(r"(\d{1,6})([smhd])", text):
        return time.time() - int(found[1]) * _UNITS[found[2]]
    try:
        at = datetime.datetime.fromisoformat(text)
    except ValueError as exc:
        raise UsageError(f"'{text}' is no point in time", hint="Write 30m, 2h, 7d or 2026-11-01.") from exc
    return at.timestamp()


def filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that choose among the records."""
    for add in (
        option("--before", default="", metavar="TIME", help="Older than this: 7d, or a date.", section="Which ones"),
        option(
            "--since", default="", metavar="TIME", help="Newer than this: 30m, 2h, 7d, a date.", section="Which ones"
        ),
        option("--failed", is_flag=True, help="Those that failed.", section="Which ones"),
        option("--status", type=int, default=0, metavar="CODE", help="With this HTTP status.", section="Which ones"),
        option("--operation", default="", help="Of this operation: chat, messages, …", section="Which ones"),
        option("--model", default="", help="To this model.", section="Which ones", shell_complete=complete_model),
        option("--key", default="", metavar="KEY", help="With this key, by name or id.", section="Which ones"),
    ):
        command = add(command)
    return command


def wanted(given: dict[str, Any]) -> Wanted:
    """What those options say."""
    from pierhead.gateway.telemetry.records import Wanted

    key = given["key"]
    if key and not key.startswith("key_"):
        from pierhead.daemon.keys import Keys

        paths = here()
        key = next((i for i, n in Keys(paths.database, paths.state / "pepper").names().items() if n == key), key)
    return Wanted(
        key=key,
        model=given["model"],
        operation=given["operation"],
        status=given["status"],
        failed=given["failed"],
        since=when(given["since"]),
        before=when(given["before"]),
    )


@click.group(
    cls=Verbs,
    examples=(
        ("pier requests list --failed --since 1h", "What went wrong lately."),
        ("pier requests show req_5f2c81d07a3e1b", "One request and its answer."),
        ("pier requests export --model smollm2 -o sample.ndjson", "For `pier replay`, or another tool."),
        ("pier requests rm --before 7d", "Forget what is old."),
    ),
)
def requests() -> None:
    """Look at recorded requests, with what is private taken out.

    Nothing is recorded unless [gateway] record says so.
    """


@requests.command("list")
@filters
@option("-n", "--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="At most so many.")
@json_option
def list_(limit: int, as_json: bool, **given: Any) -> None:
    """List recorded requests, the newest first."""
    found = records().find(wanted(given), limit)
    if as_json:
        print_json([brief(r) for r in found])
        return
    rows = [
        (
            r.id,
            age(_iso(r.time)),
            f"{r.operation}, replay" if r.replay_of else r.operation,
            r.model,
            r.key or "-",
            f"{r.status}" if r.ok else f"{r.status} {r.code or 'aborted'}",
            f"{number(r.prompt_tokens)}+{number(r.completion_tokens)}",
            f"{r.seconds:.2f} s",
        )
        for r in found
    ]
    head = ("ID", "WHEN", "OPERATION", "MODEL", "KEY", "STATUS", "TOKENS", "TIME")
    table(head, rows, right=(6, 7), fold=(3,), spare=(2, 4, 6, 1))
    if not found:
        say('Nothing is recorded. Set [gateway] record = "errors" (or sampled, or all) in the settings.')


@requests.command()
@click.argument("name", metavar="ID")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one request and its answer; the beginning of an ID is enough."""
    import json

    from msgspec import to_builtins

    r = records().get(name)
    if as_json:
        print_json(to_builtins(r))
        return
    facts = [
        ("Request", r.id),
        ("When", f"{_iso(r.time)} ({age(_iso(r.time))})"),
        ("Operation", f"{r.operation} at {r.path}"),
        ("Model", r.model if r.asked == r.model else f"{r.model}, asked for as {r.asked}"),
        ("Replica", " ".join((r.replica, r.revision)).strip() or "-"),
        ("Key", r.key or "-"),
        ("Status", f"{r.status} {r.code}".strip() if r.ok else f"{r.status} {r.code or 'aborted'}"),
        ("Tokens", f"{r.prompt_tokens} ({r.cached_tokens} cached) + {r.completion_tokens}"),
        ("Time", f"{r.seconds:.3f} s, queued {r.queued:.3f} s" + (f", first token {r.ttft:.3f} s" if r.ttft else "")),
    ]
    if r.replay_of:
        facts.append(("Replay of", r.replay_of))
    if r.cut or r.media:
        facts.append(("Note", "cut: it was too long" if r.cut else "its images and files are digests now"))
    pairs(facts)
    click.echo()
    click.echo(printable(json.dumps(r.request, indent=2, ensure_ascii=False)))
    click.echo()
    answer = r.text or ("" if r.answer is None else json.dumps(r.answer, indent=2, ensure_ascii=False))
    click.echo(printable(answer or "(no answer)"))


@requests.command()
@click.argument("names", metavar="[ID]...", nargs=-1)
@filters
@option("-a", "--all", "everything", is_flag=True, help="All of them.", section="Which ones")
@json_option
def rm(names: tuple[str, ...], everything: bool, as_json: bool, **given: Any) -> None:
    """Remove recorded requests; their place on the disk is overwritten."""
    if not names and not everything and not any(given.values()):
        raise UsageError("say which ones", hint="Name them, or type `pier requests rm --before 7d`, or `--all`.")
    store = records()
    count = store.remove(wanted(given), [store.get(name).id for name in names])
    if as_json:
        print_json({"removed": count})
    else:
        say(f"Removed {several(count, 'request')}.")


@requests.command()
@filters
@option("-o", "--output", metavar="FILE", help="Write there (default: print).")
@json_option
def export(output: str | None, as_json: bool, **given: Any) -> None:
    """Print recorded requests, one JSON object a line, the newest first."""
    from msgspec.json import encode

    found = records().each(wanted(given))
    if output is None:
        for r in found:
            sys.stdout.buffer.write(encode(r) + b"\n")
        sys.stdout.buffer.flush()
        return
    count = 0
    path = Path(output)
    path.touch(mode=0o600)
    with path.open("wb") as file:
        for count, r in enumerate(found, 1):  # noqa: B007
            file.write(encode(r) + b"\n")
    if as_json:
        print_json({"exported": count, "file": output})
    else:
        say(f"Wrote {several(count, 'request')} to {output}.")


def brief(r: Record) -> dict[str, Any]:
    """A record without what was said."""
    from msgspec import to_builtins

    return {k: v for k, v in to_builtins(r).items() if k not in ("request", "answer", "text")}


def _iso(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
