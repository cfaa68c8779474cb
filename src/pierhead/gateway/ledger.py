"""The durable side of budgets: how much of each is spent or lent out, in SQLite or in memory; spends nothing itself.

What a gateway borrows counts as spent from then on, so a crash cannot spend it twice; a clean end brings the rest back.
"""

from __future__ import annotations

import calendar
import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

_KEPT_DAYS = 400
_SCHEMA = """
CREATE TABLE IF NOT EXISTS spent (
    key TEXT NOT NULL,
    unit TEXT NOT NULL,
    span TEXT NOT NULL,
    used INTEGER NOT NULL,
    PRIMARY KEY (key, unit, span)
) STRICT, WITHOUT ROWID
"""


class Span(NamedTuple):
    """A calendar day (``2027-01-31``) or month (``2027-01``) in UTC, from ``since`` until ``until`` (Unix time)."""

    label: str
    since: float
    until: float


def span(window: Literal["day", "month"], now: float) -> Span:
    """The day or month that ``now`` is in."""
    at = time.gmtime(now)
    year, month, day = at.tm_year, at.tm_mon, at.tm_mday
    if window == "day":
        since = calendar.timegm((year, month, day, 0, 0, 0))
        return Span(f"{year:04}-{month:02}-{day:02}", since, since + 86400)
    after = (year + month // 12, month % 12 + 1)
    since = calendar.timegm((year, month, 1, 0, 0, 0))
    return Span(f"{year:04}-{month:02}", since, calendar.timegm((*after, 1, 0, 0, 0)))


class Row(NamedTuple):
    """One budget in one span."""

    key: str
    unit: str
    span: str


class Lease(NamedTuple):
    """What was lent, and what is ``left`` to lend after it."""

    granted: int
    left: int


class Ledger(Protocol):
    """Lends out budgets; blocking, safe to use from several threads and processes."""

    def lease(self, row: Row, limit: int, least: int, want: int) -> Lease:
        """Lend ``want`` if there is plenty, at least ``least``, or nothing; OSError when it cannot be kept."""
        ...

    def give_back(self, row: Row, amount: int) -> None:
        """Take back what was lent and not spent; negative books what was spent beyond it."""
        ...

    def used(self, key: str) -> dict[tuple[str, str], int]:
        """What of each (unit, span) a key has spent or borrowed."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


def share(left: int, least: int, want: int) -> int:
    """How much to lend of what is ``left``: slices shrink towards the end, so that others find something, too."""
    return 0 if least > left else max(least, min(want, left // 8))


class MemoryLedger:
    """Keeps budgets for as long as the process lives: for gateways without a folder of their own."""

    def __init__(self) -> None:
        self._used: dict[Row, int] = {}
        self._lock = threading.Lock()

    def lease(self, row: Row, limit: int, least: int, want: int) -> Lease:
        with self._lock:
            used = self._used.get(row, 0)
            granted = share(limit - used, least, want)
            self._used[row] = used + granted
            return Lease(granted, limit - used - granted)

    def give_back(self, row: Row, amount: int) -> None:
        with self._lock:
            self._used[row] = max(0, self._used.get(row, 0) - amount)

    def used(self, key: str) -> dict[tuple[str, str], int]:
        with self._lock:
            return {(row.unit, row.span): used for row, used in self._used.items() if row.key == key}

    def close(self) -> None:
        pass


class SqliteLedger:
    """Keeps budgets in a file that several gateways may share; each call is on disk when it returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def lease(self, row: Row, limit: int, least: int, want: int) -> Lease:
        with self._change() as database:
            used = self._read(database, row)
            granted = share(limit - used, least, want)
            if granted:
                self._write(database, row, used + granted)
            return Lease(granted, limit - used - granted)

    def give_back(self, row: Row, amount: int) -> None:
        with self._change() as database:
            self._write(database, row, max(0, self._read(database, row) - amount))

    def used(self, key: str) -> dict[tuple[str, str], int]:
        if not self._path.exists():
            return {}
        with self._change() as database:
            rows = database.execute("SELECT unit, span, used FROM spent WHERE key = ?", (key,))
            return {(unit, label): used for unit, label, used in rows}

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def _read(self, database: sqlite3.Connection, row: Row) -> int:
        found = database.execute("SELECT used FROM spent WHERE key = ? AND unit = ? AND span = ?", row).fetchone()
        return int(found[0]) if found else 0

    def _write(self, database: sqlite3.Connection, row: Row, used: int) -> None:
        database.execute("INSERT OR REPLACE INTO spent VALUES (?, ?, ?, ?)", (*row, used))

    @contextlib.contextmanager
    def _change(self) -> Generator[sqlite3.Connection]:
        with self._lock:
            try:
                database = self._database or self._open()
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                    database.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        database.execute("ROLLBACK")
                    raise
            except sqlite3.Error as exc:
                raise OSError(f"{self._path}: {exc}") from exc

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
        # Rollback journal, not WAL: two gateways switch to it without a race, and leases are few.
        database.execute("PRAGMA synchronous = FULL")
        database.execute(_SCHEMA)
        oldest = span("day", time.time() - _KEPT_DAYS * 86400).label
        database.execute("DELETE FROM spent WHERE span < ?", (oldest,))
        self._database = database
        return database
