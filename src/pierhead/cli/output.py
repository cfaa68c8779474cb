"""What a person or a program reads: errors, tables, sizes, ages and JSON; Rich is loaded only to draw."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from pierhead.errors import PierError
from pierhead.paths import Paths, resolve

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pierhead.config import Loaded

# What models and engines write could steer a terminal; of the control characters only these two are let through.
_UNPRINTABLE = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def here() -> Paths:
    """The folders of this installation."""
    return resolve()


def settings(paths: Paths) -> Loaded:
    """The settings of this installation."""
    from pierhead.config import load  # msgspec, which quick verbs do without

    return load(paths.config / "config.toml")


def print_json(value: Any) -> None:
    """One JSON document, indented, on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=_builtin) + "\n")


def print_json_line(value: Any) -> None:
    """One JSON document of a stream of them (NDJSON), at once."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=_builtin) + "\n")
    sys.stdout.flush()


def _builtin(value: Any) -> Any:
    from msgspec import to_builtins

    return to_builtins(value)


def printable(text: str) -> str:
    """Foreign text without what would steer a terminal (escape sequences, backspaces, bells)."""
    return text.translate(_UNPRINTABLE)


def print_error(error: PierError, as_json: bool) -> None:
    """What failed, why, and what to type next."""
    if as_json:
        print_json_line({"error": error.to_dict()})  # one line, since verbs that print events may have begun
        return
    say(f"{click.style('Error:', fg='red', bold=True)} {printable(error.message)}")
    log = error.data.get("log")
    if isinstance(log, list) and log:
        say("The engine's last words:")
        for line in log[-10:]:  # pyright: ignore[reportUnknownVariableType]
            say(f"  | {printable(str(line))}")  # pyright: ignore[reportUnknownArgumentType]
    if error.hint:
        say(f"  {printable(error.hint)}")


def say(text: str) -> None:
    """Talk, on stderr."""
    click.echo(wrapped(text, sys.stderr), err=True)


def warn(text: str) -> None:
    """A warning, on stderr."""
    say(f"{click.style('Note:', fg='yellow', bold=True)} {text}")


def wrapped(text: str, stream: TextIO, indent: int | None = None) -> str:
    """Text whose lines end between words on a terminal; ``indent``: of what follows, else each line's own."""
    if not stream.isatty():
        return text
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    lines: list[str] = []
    for line in text.split("\n"):
        if len(click.unstyle(line)) <= width:
            lines.append(line)
            continue
        own = len(line) - len(line.lstrip()) if indent is None else indent
        plain = click.unstyle(line)
        if indent and " " not in plain[indent:].strip():  # a digest, say: whole, so that it can be copied
            lines.append(line)
            continue
        fold = textwrap.TextWrapper(
            width, subsequent_indent=" " * own, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
        )
        first, *more = fold.wrap(plain)
        head, reset, _ = line.rpartition("\x1b[0m")  # what is styled is what a line begins with
        word = click.unstyle(head)
        lines += [head + reset + first[len(word) :] if reset and first.startswith(word) else first, *more]
    return "\n".join(lines)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    fold: Sequence[int] = (),
    spare: Sequence[int] = (),
) -> None:
    """A table on stdout: drawn by Rich on a terminal, else plain and aligned.

    Long cells of ``fold`` may wrap; on a narrow terminal the columns of ``spare`` are left out, the first one first.
    A cell of several lines has them below each other on a terminal, else in one line.
    """
    if rows and sys.stdout.isatty():
        console = _console()
        console.print(drawn_table(head, rows, right=right, fold=fold, spare=spare, room=console.width))
        return
    lines = [head, *(tuple(cell.replace("\n", ", ") for cell in row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        click.echo("  ".join(cells).rstrip())


def fitting(widths: Sequence[int], room: int, fold: Sequence[int], spare: Sequence[int]) -> list[int]:
    """The columns that fit in ``room``, where one that may wrap keeps its width or at least half of the room."""
    kept = list(range(len(widths)))
    for column in spare:
        least = (min(widths[i], room // 2) if i in fold else widths[i] for i in kept)
        if sum(least) + 2 * (len(kept) - 1) <= room:
            break
        kept.remove(column)
    return kept


def drawn_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    fold: Sequence[int] = (),
    spare: Sequence[int] = (),
    room: int,
) -> Table:
    """The same table for Rich, in ``room`` columns."""
    from rich.table import Table
    from rich.text import Text

    longest = [
        max(len(line) for cell in column for line in cell.split("\n")) for column in zip(head, *rows, strict=True)
    ]
    kept = fitting(longest, room, fold, spare)
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i in kept:
        made.add_column(head[i], justify="right" if i in right else "left", overflow="fold", no_wrap=i not in fold)
    for row in rows:
        made.add_row(*(Text(printable(row[i])) for i in kept))
    return made


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, aligned, on stdout."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        first, *more = printable(value).splitlines() or [""]
        lines = (f"{click.style(name.ljust(width), bold=True)}  {first}", *(f"{' ' * width}  {line}" for line in more))
        for line in lines:
            click.echo(wrapped(line, sys.stdout, width + 2))


def size(count: float) -> str:
    """Bytes for people: ``98.4 MB``."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    return _scaled(count / 1000, ("kB", "MB", "GB", "TB"), " ")


def several(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def number(count: int | None) -> str:
    """A count for people: ``134.5M``."""
    value = float(count or 0)
    return f"{value:.0f}" if value < 1000 else _scaled(value / 1000, ("K", "M", "B", "T"), "")


def _scaled(value: float, units: Sequence[str], space: str) -> str:
    for unit in units[:-1]:
        if abs(value) < 999.95:  # what rounds to 1000.0 is one of the next unit
            return f"{value:.1f}{space}{unit}"
        value /= 1000
    return f"{value:.1f}{space}{units[-1]}"


def age(stamp: str | None) -> str:
    """How long ago (or until) an ISO 8601 time is: ``3 min ago``, ``in 4 min``."""
    if not stamp:
        return "never"
    import datetime

    at = datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00"))
    seconds = (datetime.datetime.now(datetime.UTC) - at).total_seconds()
    text = duration(abs(seconds))
    return f"{text} ago" if seconds >= 0 else f"in {text}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for limit, unit, name in ((60, 1, "s"), (60, 60, "min"), (48, 3600, "h")):
        if round(seconds / unit) < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"
