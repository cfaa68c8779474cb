"""What a person sees of a load test: bars while it runs, then tables and a chart; measures nothing."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import click

from pierhead.cli.output import print_json, printable, say, table, warn
from pierhead.loadtest import bars, compare
from pierhead.loadtest.bars import short
from pierhead.loadtest.figures import FIGURES

if TYPE_CHECKING:
    from pierhead.loadtest.compare import Change
    from pierhead.loadtest.drive import Seen
    from pierhead.loadtest.report import Report, Row

_VERDICTS = {"noise": "within the noise", "unknown": "one round tells nothing"}


@contextlib.contextmanager
def progress(as_json: bool) -> Generator[Callable[[Seen], None]]:
    """Who watches: a bar on a terminal, else a line for each finished pass."""
    if not sys.stderr.isatty() or as_json:
        yield _line if not as_json else _nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    text, figures = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[said]}", markup=False)
    columns = (text, BarColumn(bar_width=None), figures, TimeRemainingColumn())
    shown = Progress(*columns, console=Console(stderr=True), transient=True, expand=True, refresh_per_second=4)
    task = shown.add_task("Load test", total=None, said="")
    with shown:
        yield lambda seen: _bar(shown, task, seen)


def _bar(shown: Any, task: Any, seen: Seen) -> None:
    failed = f", {seen.failed:,} failed" if seen.failed else ""
    shown.update(
        task,
        total=seen.total,
        completed=seen.number + seen.share,
        description=f"{seen.load.name}, round {seen.round + 1}",
        said=f"{seen.done:,} answers{failed}",
    )


def _line(seen: Seen) -> None:
    if seen.share >= 1.0:
        failed = f", {seen.failed:,} failed" if seen.failed else ""
        say(f"[{seen.number + 1}/{seen.total}] {seen.load.name}, round {seen.round + 1}: {seen.done:,} answers{failed}")


def _nothing(seen: Seen) -> None:
    pass


def show(now: Report, old: Report | None, as_json: bool) -> None:
    """Everything that was measured, and what changed."""
    changes = compare.compare(old, now) if old else []
    if as_json:
        print_json(now if old is None else _with_changes(now, old, changes))
        return
    if old is None:
        _table(now)
        click.echo()
        for line in bars.draw(now, min(shutil.get_terminal_size().columns, 100)):
            click.echo(line)
    else:
        _changes(now, old, changes)
    _remarks(now)


def _with_changes(now: Report, old: Report, changes: list[Change]) -> dict[str, Any]:
    import msgspec

    made: dict[str, Any] = msgspec.to_builtins(now)
    found = [msgspec.to_builtins(c) for c in changes]
    for row in found:
        row |= {k: None for k in ("low", "high") if not math.isfinite(row[k])}
    return made | {"old": msgspec.to_builtins(old), "changes": found, "unlike": compare.unlike(old, now)}


def _table(report: Report) -> None:
    streamed = any("ttft_p50_ms" in row.figures for row in report.results)
    head, spare = columns(streamed)
    rows = [_cells(row, streamed) for row in report.results]
    table(head, rows, right=range(1, len(head)), spare=spare)


def columns(streamed: bool) -> tuple[list[str], tuple[int, ...]]:
    """The columns of the table, and which are left out first where there is no room."""
    head = ["LOAD", "ANSWERS", "FAILED", "REQ/S"]
    head += ["OUT TOK/S", "TOK/S", "TTFT P50", "P95", "P99", "TOKEN P50", "P95", "P99"] if streamed else ["TOK/S"]
    return [*head, "WHOLE P50", "P95", "P99"], (11, 8, 5, 14, 13, 10, 7, 2) if streamed else (7, 2)


def _cells(row: Row, streamed: bool) -> list[str]:
    found = row.figures

    def cell(name: str) -> str:
        return short(found[name]) if name in found else "-"

    cells = [row.load, f"{row.requests - row.failed:,}", f"{row.failed:,}", cell("rps")]
    names = ["total_tps"]
    if streamed:
        names = ["output_tps", "total_tps", *(f"{n}_p{p}_ms" for n in ("ttft", "itl") for p in (50, 95, 99))]
    return cells + [cell(name) for name in (*names, "e2e_p50_ms", "e2e_p95_ms", "e2e_p99_ms")]


def _changes(now: Report, old: Report, changes: list[Change]) -> None:
    said = [_change(c) for c in changes if not c.figure.endswith("mean_ms") and (c.old or c.new)]
    if not said:
        warn("the two have no load in common; give both the same --concurrency or --rate.")
        return
    table(("LOAD", "FIGURE", "THEN", "NOW", "CHANGE", "VERDICT"), said, right=(2, 3, 4))
    for line in compare.unlike(old, now):
        warn(printable(f"not the same test: {line}"))


def _change(c: Change) -> tuple[str, ...]:
    what, unit, _ = FIGURES[c.figure]
    room = f" (±{(c.high - c.low) / 2:.1%})" if math.isfinite(c.high - c.low) else ""
    verdict = _VERDICTS.get(c.verdict, c.verdict)
    name = f"{what}, {unit}" if unit == "ms" else f"{what}{unit}"
    return (c.load, name, short(c.old), short(c.new), f"{c.change:+.1%}{room}", verdict)


def _remarks(report: Report) -> None:
    """Lengths, failures and what else one must know, on stderr."""
    rows = [row for row in report.results if row.requests > row.failed]
    if rows:
        prompt = sum(r.prompt_tokens for r in rows) / len(rows)
        output = sum(r.output_tokens for r in rows) / len(rows)
        text = f"Prompts of {prompt:.0f} tokens on average" + (f", answers of {output:.0f}" if output else "")
        say(f"{text}; times in milliseconds, from the arrival of each request.")
    for row in report.results:
        for kind, count in row.errors.items():
            reason = f": {row.reasons[kind]}" if kind in row.reasons else ""
            warn(printable(f"{row.load}: {count:,} × {kind}{reason}"))
        for note in row.notes:
            warn(note)
