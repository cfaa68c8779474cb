"""Who used how much: the gateways' journals folded into sums per day, key and what answered; counts no request."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pierhead.errors import CorruptData, UsageError
from pierhead.gateway import journal_lines as journal

log = logging.getLogger(__name__)

BY = ("day", "key", "model", "revision", "operation")
KEEP_DAYS = 400
_CHUNK = 8 << 20
_SUMS = ("requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens", "cost", "seconds")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sums (
    day INTEGER NOT NULL,  -- since 1970-01-01, UTC
    key TEXT NOT NULL,
    model TEXT NOT NULL,
    operation TEXT NOT NULL,
    requests INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost INTEGER NOT NULL,  -- millionths
    seconds REAL NOT NULL,
    revision TEXT NOT NULL,  -- of the model that answered; empty where none of ours did, and before it was known
    PRIMARY KEY (day, key, model, operation, revision)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS journals (
    file TEXT PRIMARY KEY,
    folded INTEGER NOT NULL  -- bytes of it that are in the sums
) STRICT, WITHOUT ROWID;
"""
_ON_TOP = """ ON CONFLICT DO UPDATE SET
    requests = requests + excluded.requests,
    errors = errors + excluded.errors,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    cost = cost + excluded.cost,
    seconds = seconds + excluded.seconds
"""
_ADD = "INSERT INTO sums VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)" + _ON_TOP  # noqa: S608 - a constant
_Place = tuple[int, str, str, str, str]


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """The sums of one group; what it is not grouped by is null. ``cost`` is in the currency of the prices."""

    day: str | None = None
    key: str | None = None
    key_name: str | None = None
    model: str | None = None
    revision: str | None = None
    operation: str | None = None
    requests: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: float
    seconds: float


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    """Sums per group, and of all groups together; ``since`` is the first day in them (UTC), null for all."""

    by: tuple[str, ...]
    since: str | None
    rows: list[UsageRow]
    total: UsageRow


class Usage:
    """The sums in a database of their own, so that folding delays nobody else; blocking, safe for several processes."""

    def __init__(self, database: Path, journals: Path, names: Callable[[], Mapping[str, str]]) -> None:
        self._database = database
        self._journals = journals
        self._names = names

    # --- folding --------------------------------------------------------------------------------------------------

    def fold(self) -> int:
        """Take in what the journals have gained, each line exactly once; how many requests that were."""
        found = journal.files(self._journals)
        if not found and not self._database.exists():
            return 0
        folded = 0
        with self._open() as database:
            for path, _ in found:
                folded += self._fold(database, path)
            with database:
                database.execute("BEGIN IMMEDIATE")
                # Another process may have folded what came after this one had looked: what is gone is asked now.
                noted = database.execute("SELECT file FROM journals").fetchall()
                gone = [(file,) for (file,) in noted if not (self._journals / file).exists()]
                database.executemany("DELETE FROM journals WHERE file = ?", gone)
                database.execute("DELETE FROM sums WHERE day < ?", (_today() - KEEP_DAYS,))
        return folded

    def _fold(self, database: sqlite3.Connection, path: Path) -> int:
        """One journal, to its end as it is now; a file that nobody writes to any more is removed afterwards."""
        folded = 0
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        with contextlib.closing(os.fdopen(fd, "rb", buffering=0)):
            ended = journal.sealed(fd)
            while True:
                count, more = self._step(database, path, fd)
                folded += count
                if not more:
                    break
        if ended:
            path.unlink(missing_ok=True)
        return folded

    def _step(self, database: sqlite3.Connection, path: Path, fd: int) -> tuple[int, bool]:
        """One piece: its sums and how far they go are one transaction."""
        with database:
            database.execute("BEGIN IMMEDIATE")
            if not os.fstat(fd).st_nlink:  # another process has folded it whole and removed it
                return 0, False
            row = database.execute("SELECT folded FROM journals WHERE file = ?", (path.name,)).fetchone()
            start: int = row[0] if row else 0
            raw = os.pread(fd, _CHUNK, start)
            lines, taken, damaged = journal.lines(raw)
            if damaged:
                log.warning("%d damaged lines in the journal %s", damaged, path)
            if not taken:
                return 0, False
            database.executemany(_ADD, ((*place[:4], *sums, place[4]) for place, sums in _summed(lines).items()))
            database.execute("INSERT OR REPLACE INTO journals VALUES (?, ?)", (path.name, start + taken))
        return len(lines), len(raw) == _CHUNK

    # --- reading --------------------------------------------------------------------------------------------------

    def report(
        self, by: Sequence[str] = ("key", "model"), *, since: str = "", key: str = "", model: str = ""
    ) -> UsageReport:
        """Sums since a day (``7d``, ``2026-11-01``; "" for all), of one key (id or name) or model if wanted."""
        unknown = [name for name in by if name not in BY]
        if unknown:
            raise UsageError(f"usage is not kept by '{unknown[0]}'", hint=f"There are: {', '.join(BY)}.")
        first = _first_day(since)
        names = self._names()
        where: list[str] = ["day >= ?"]
        values: list[Any] = [first]
        if key:
            ids = [i for i, n in names.items() if key in (i, n)] or [key]
            where.append(f"key IN ({','.join('?' * len(ids))})")
            values += ids
        if model:
            where.append("model = ?")
            values.append(model)
        condition = " AND ".join(where)
        return UsageReport(
            by=tuple(by),
            since=_iso(first) if since else None,
            rows=self._rows(tuple(dict.fromkeys(by)), condition, values, names),
            total=self._rows((), condition, values, names)[0],
        )

    def _rows(self, by: tuple[str, ...], where: str, values: list[Any], names: Mapping[str, str]) -> list[UsageRow]:
        sums = ", ".join(f"total({n})" if n == "seconds" else f"coalesce(sum({n}), 0)" for n in _SUMS)
        # Only words of BY and _SUMS are put into the text.
        query = f"SELECT {', '.join((*by, sums))} FROM sums WHERE {where}"  # noqa: S608
        if by:
            query += f" GROUP BY {', '.join(by)} ORDER BY {', '.join(by)}"
        with self._open() as database:
            found = database.execute(query, values).fetchall()
        return [_row(dict(zip((*by, *_SUMS), row, strict=True)), names) for row in found]

    @contextlib.contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        try:
            os.close(os.open(self._database, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            with contextlib.closing(sqlite3.connect(self._database, timeout=30, isolation_level=None)) as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = FULL")
                database.executescript(_SCHEMA)
                _migrate(database)
                yield database
        except sqlite3.DatabaseError as exc:
            raise CorruptData(
                f"cannot use the database {self._database}: {exc}",
                hint=f"Restore {self._database} from a backup, or move it away to start with no sums.",
            ) from exc


def _migrate(database: sqlite3.Connection) -> None:
    """Take over the sums of versions that did not tell revisions apart."""
    if database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'usage'").fetchone() is None:
        return
    with database:
        database.execute("BEGIN IMMEDIATE")
        if database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'usage'").fetchone() is not None:
            database.execute("INSERT INTO sums SELECT *, '' FROM usage WHERE true" + _ON_TOP)  # noqa: S608 - a constant
            database.execute("DROP TABLE usage")


def _summed(lines: list[journal.Line]) -> dict[_Place, list[Any]]:
    sums: dict[_Place, list[Any]] = {}
    for line in lines:
        place = (int(line.time // 86400), line.key, line.model, line.operation, line.revision)
        row = sums.get(place)
        if row is None:
            row = sums[place] = [0, 0, 0, 0, 0, 0, 0.0]
        row[0] += 1
        row[1] += not line.ok or line.status >= 400
        row[2] += line.prompt
        row[3] += line.cached
        row[4] += line.completion
        row[5] += line.cost
        row[6] += line.seconds
    return sums


def _row(found: dict[str, Any], names: Mapping[str, str]) -> UsageRow:
    found["cost"] = found["cost"] / 1e6
    found["seconds"] = round(found["seconds"], 6)
    if "day" in found:
        found["day"] = _iso(found["day"])
    if "key" in found:
        found["key_name"] = names.get(found["key"])
    return UsageRow(**found)


def _today() -> int:
    return int(time.time() // 86400)


def _iso(day: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()


def _first_day(since: str) -> int:
    """``7d`` is today and the six days before it."""
    if not since:
        return 0
    try:
        if since.endswith("d") and since[:-1].isdecimal() and int(since[:-1]) < 100000:
            return _today() - max(int(since[:-1]), 1) + 1
        return (datetime.date.fromisoformat(since) - datetime.date(1970, 1, 1)).days
    except ValueError as exc:
        raise UsageError(
            f"'{since}' is no time to begin at", hint="Write days as 7d, or a date as 2026-11-01."
        ) from exc
