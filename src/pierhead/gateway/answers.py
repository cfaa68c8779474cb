"""The store of answers: what the Responses API finds again, per API key, in one SQLite file; knows no dialect.

The file is used from one thread of its own. A second gateway of the same installation (an upgrade) may use it at the
same time. What ``keep`` has stored is safe from the death of this process. Without a file it all stays in memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pierhead.gateway.dialects.base import Save
from pierhead.gateway.faults import Fault

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT NOT NULL, name TEXT NOT NULL, stored REAL NOT NULL, body BLOB NOT NULL, PRIMARY KEY (key, name));
CREATE INDEX IF NOT EXISTS by_age ON answers (stored);
CREATE TABLE IF NOT EXISTS totals (count INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO totals SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM totals);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON answers BEGIN
  UPDATE totals SET count = count + 1, bytes = bytes + length(new.body); END;
CREATE TRIGGER IF NOT EXISTS changed AFTER UPDATE ON answers BEGIN
  UPDATE totals SET bytes = bytes + length(new.body) - length(old.body); END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON answers BEGIN
  UPDATE totals SET count = count - 1, bytes = bytes - length(old.body); END;
"""
_PUT = (
    "INSERT INTO answers VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET stored = excluded.stored, body = excluded.body"
)
_APPEND = "UPDATE answers SET stored = ?, body = CAST(body || ? AS BLOB) WHERE key = ? AND name = ? AND stored >= ?"
_GET = "SELECT body FROM answers WHERE key = ? AND name = ? AND stored >= ?"
_DROP = "DELETE FROM answers WHERE key = ? AND name = ?"
_OLDEST = "DELETE FROM answers WHERE rowid IN (SELECT rowid FROM answers ORDER BY stored LIMIT ?)"
_BUSY = 10.0  # seconds to wait for another gateway that writes
_IN_MEMORY = 64 << 20  # bytes that may be held without a file
_LARGEST = 32 << 20  # bytes that clients may make one conversation of by adding to it
_AT_ONCE = 100  # answers thrown out in one go when the store is full


class Answers:
    """Holds at most ``most`` answers and ``most_bytes`` bytes of them for ``age`` seconds; the oldest go first."""

    def __init__(self, file: Path | None, *, most: int, most_bytes: int, age: float) -> None:
        self._file = file
        self._most = most
        self._most_bytes = most_bytes if file is not None else min(most_bytes, _IN_MEMORY)
        self._largest = min(self._most_bytes // 4, _LARGEST)
        self._age = age
        self._thread = ThreadPoolExecutor(1, "answers")
        self._open: sqlite3.Connection | None = None

    async def load(self, key: str, name: str) -> bytes | None:
        """What this key stored under this name, if it is still there."""

        def work(db: sqlite3.Connection) -> bytes | None:
            row = db.execute(_GET, (key, name, self._eldest())).fetchone()
            return row[0] if row is not None else None

        return await self._run(work)

    async def keep(self, key: str, saves: tuple[Save, ...]) -> None:
        """Store all of these or none, for good when it returns; Fault 507 when they cannot be stored."""

        def work(db: sqlite3.Connection) -> None:
            now = time.time()
            for save in saves:
                if save.append:
                    db.execute(_APPEND, (now, save.body, key, save.key, self._eldest()))
                else:
                    db.execute(_PUT, (key, save.key, now, save.body))
            self._shrink(db, now)

        await self._run(work)

    async def change(self, key: str, name: str, edit: Callable[[bytes], bytes | None]) -> bytes | None:
        """Replace what is stored by what ``edit`` makes of it (None: remove it); returns what was there.

        Fault 413 when that is too much for one.
        """

        def work(db: sqlite3.Connection) -> bytes | None:
            row = db.execute(_GET, (key, name, self._eldest())).fetchone()
            if row is None:
                return None
            made = edit(row[0])
            if made is None:
                db.execute(_DROP, (key, name))
            elif len(made) > max(len(row[0]), self._largest):
                raise Fault(413, "too_much_stored", f"one conversation may have {self._largest} bytes.")
            else:
                now = time.time()
                db.execute(_PUT, (key, name, now, made))
                self._shrink(db, now)
            return row[0]

        return await self._run(work)

    def close(self) -> None:
        """Finish what is under way and let go of the file."""
        self._thread.submit(self._shut)
        self._thread.shutdown()

    # --- in the thread --------------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        import sqlite3

        try:
            if self._open is None:
                self._open = self._connect()
            with self._open as db:
                db.execute("BEGIN IMMEDIATE")
                return work(db)
        except (sqlite3.Error, OSError) as exc:
            raise Fault(507, "storage_failed", f"stored answers cannot be reached now: {exc}.") from exc

    def _connect(self) -> sqlite3.Connection:
        import sqlite3

        if self._file is not None:
            self._file.touch(mode=0o600)
        db = sqlite3.connect(self._file or ":memory:", timeout=_BUSY, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing; only a power cut may
        db.executescript(_SCHEMA)
        return db

    def _shut(self) -> None:
        if self._open is not None:
            self._open.close()

    def _eldest(self) -> float:
        return time.time() - self._age

    def _shrink(self, db: sqlite3.Connection, now: float) -> None:
        """Throw out what is too old, then the oldest until the rest is within bounds."""
        db.execute("DELETE FROM answers WHERE stored < ?", (now - self._age,))
        while True:
            count, size = db.execute("SELECT count, bytes FROM totals").fetchone()
            if count <= self._most and size <= self._most_bytes:
                return
            db.execute(_OLDEST, (max(1, min(count - self._most, _AT_ONCE)),))
