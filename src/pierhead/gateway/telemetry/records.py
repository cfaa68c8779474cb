"""Recorded requests on disk: a bounded SQLite file that only its owner reads; redacts nothing itself."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pierhead.errors import CorruptData, NotFound, UsageError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    time REAL NOT NULL,
    key TEXT NOT NULL,
    model TEXT NOT NULL,
    operation TEXT NOT NULL,
    status INTEGER NOT NULL,
    ok INTEGER NOT NULL,
    size INTEGER NOT NULL,
    body TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS by_id ON records (id);
CREATE INDEX IF NOT EXISTS by_time ON records (time);
"""
_LIST_MAX = 100_000


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One request and its answer, cleaned. Times in seconds, ``time`` Unix time of its end, ``cost`` in millionths.

    ``request`` is the body, ``answer`` the answer's when it was one JSON value; ``text`` is what the model said, also
    when it streamed. ``cut``: the body was too long to be kept whole, ``media``: it had images or files, of which only
    digests were kept; neither can be sent again. ``replay_of`` is the id of the request that this one repeated.
    """

    id: str
    time: float
    key: str
    operation: str
    dialect: str
    path: str
    asked: str
    model: str
    replica: str = ""
    revision: str = ""
    status: int
    ok: bool
    stream: bool
    code: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0
    queued: float = 0.0
    ttft: float = 0.0
    seconds: float = 0.0
    request: Any = None
    answer: Any = None
    text: str = ""
    cut: bool = False
    media: bool = False
    replay_of: str = ""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which records: empty members ask for nothing. ``since`` is Unix time."""

    key: str = ""
    model: str = ""
    operation: str = ""
    status: int = 0
    failed: bool = False
    since: float = 0.0
    before: float = 0.0


class Records:
    """Below ``folder``; ``most`` bytes of records at the most, the oldest ones go first. Blocking."""

    def __init__(self, folder: Path, most: int = 0) -> None:
        self._folder = folder
        self._file = folder / "records.db"
        self._most = most

    def add(self, records: Sequence[Record]) -> None:
        """Keep some more."""
        rows: list[tuple[Any, ...]] = []
        for r in records:
            body = msgspec.json.encode(r).decode()
            rows.append((r.id, r.time, r.key, r.model, r.operation, r.status, r.ok, len(body), body))
        with self._open() as database:
            database.executemany(
                "INSERT INTO records (id, time, key, model, operation, status, ok, size, body) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            self._trim(database)

    def _trim(self, database: sqlite3.Connection) -> None:
        if self._most <= 0:
            return
        (used,) = database.execute("SELECT coalesce(sum(size), 0) FROM records").fetchone()
        if used <= self._most:
            return
        doomed: list[tuple[int]] = []
        for number, size in database.execute("SELECT number, size FROM records ORDER BY number"):
            doomed.append((number,))
            used -= size
            if used <= self._most * 9 // 10:
                break
        database.executemany("DELETE FROM records WHERE number = ?", doomed)

    def find(self, wanted: Wanted, limit: int = 50) -> list[Record]:
        """The newest ones that fit, newest first."""
        return list(self.each(wanted, limit))

    def each(self, wanted: Wanted, limit: int = _LIST_MAX) -> Iterator[Record]:
        """The same, one at a time."""
        where, values = _where(wanted)
        if not self._file.exists():
            return
        with self._open() as database:
            # The condition is made of fixed words; what was asked for is among the values.
            query = f"SELECT body FROM records WHERE {where} ORDER BY number DESC LIMIT ?"  # noqa: S608
            for (body,) in database.execute(query, [*values, limit]):
                yield msgspec.json.decode(body, type=Record)

    def get(self, name: str) -> Record:
        """The newest one with this id, or whose id begins so; NotFound."""
        if self._file.exists():
            with self._open() as database:
                rows = database.execute(
                    "SELECT id, body FROM records WHERE id = ? OR substr(id, 1, ?) = ? "
                    "GROUP BY id HAVING number = max(number) ORDER BY id = ? DESC LIMIT 2",
                    (name, len(name), name, name),
                ).fetchall()
            if len(rows) > 1 and rows[0][0] != name:
                raise UsageError(f"several requests begin with '{name}'", hint="Type more of the one you mean.")
            if rows:
                return msgspec.json.decode(rows[0][1], type=Record)
        raise NotFound(f"no request '{name}' was recorded", hint="`pier requests list` shows what is there.")

    def remove(self, wanted: Wanted, names: Sequence[str] = ()) -> int:
        """Remove those that fit, or those of these ids; what was there is overwritten. How many."""
        if not self._file.exists():
            return 0
        with self._open() as database:
            if names:
                count = sum(database.execute("DELETE FROM records WHERE id = ?", (n,)).rowcount for n in names)
            else:
                where, values = _where(wanted)
                count = database.execute(f"DELETE FROM records WHERE {where}", values).rowcount  # noqa: S608
        with self._open() as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return count

    @contextlib.contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            os.close(os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            with contextlib.closing(sqlite3.connect(self._file, timeout=30)) as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = NORMAL")
                database.execute("PRAGMA secure_delete = ON")
                database.executescript(_SCHEMA)
                with database:
                    yield database
        except sqlite3.DatabaseError as exc:
            raise CorruptData(
                f"cannot use the recorded requests in {self._file}: {exc}",
                hint=f"Move {self._file} away; a new one is made.",
            ) from exc


def _where(wanted: Wanted) -> tuple[str, list[Any]]:
    parts, values = ["1"], list[Any]()
    for name in ("key", "model", "operation", "status"):
        value = getattr(wanted, name)
        if value:
            parts.append(f"{name} = ?")
            values.append(value)
    if wanted.failed:
        parts.append("(ok = 0 OR status >= 400)")
    if wanted.since:
        parts.append("time >= ?")
        values.append(wanted.since)
    if wanted.before:
        parts.append("time < ?")
        values.append(wanted.before)
    return " AND ".join(parts), values
