"""What a person or a program reads: errors, tables, sizes, ages and JSON; Rich is loaded only to draw."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import msgspec

from pierhead.config import Loaded, load
from pierhead.errors import PierError
from pierhead.paths import Paths, resolve

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """The ``--json`` flag, as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")(command)


def here() -> Paths:
    """The folders of this installation."""
    return resolve()


def settings(paths: Paths) -> Loaded:
    """The settings of this installation."""
    return load(paths.config / "config.toml")


def print_json(value: Any) -> None:
    """One JSON document, indented, on stdout."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False) + "\n")


def print_error(error: PierError, as_json: bool) -> None:
    """What failed, why, and what to type next."""
    if as_json:
        print_json({"error": error.to_dict()})
        return
    click.echo(f"{click.style('Error:', fg='red', bold=True)} {error.message}", err=True)
    log = error.data.get("log")
    if isinstance(log, list) and log:
        click.echo("The engine's last words:", err=True)
        for line in log[-10:]:  # pyright: ignore[reportUnknownVariableType]
            click.echo(f"  | {line}", err=True)
    if error.hint:
        click.echo(f"  {error.hint}", err=True)


def say(text: str) -> None:
    """Talk, on stderr."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """A warning, on stderr."""
    click.echo(f"{click.style('Note:', fg='yellow', bold=True)} {text}", err=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """A table on stdout; without rows only its head, without Rich."""
    if not rows:
        click.echo("  ".join(head))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for i, name in enumerate(head):
        drawn.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 160))
    console.print(drawn)


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, aligned, on stdout."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        first, *more = value.splitlines() or [""]
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {first}")
        for line in more:
            click.echo(f"{' ' * width}  {line}")


def size(count: float) -> str:
    """Bytes for people: ``98.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(count: int | None) -> str:
    """A count for people: ``134.5M``."""
    value = float(count or 0)
    for unit in ("", "K", "M", "B"):
        if value < 1000:
            return f"{value:.0f}{unit}" if not unit else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}T"


def age(stamp: str | None) -> str:
    """How long ago (or until) an ISO 8601 time is: ``3 min ago``, ``in 4 min``."""
    if not stamp:
        return "never"
    at = datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00"))
    seconds = (datetime.datetime.now(datetime.UTC) - at).total_seconds()
    text = duration(abs(seconds))
    return f"{text} ago" if seconds >= 0 else f"in {text}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"
