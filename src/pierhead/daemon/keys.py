"""API keys: made here, shown once, kept only as a keyed hash; checking them is the gateway's work."""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import os
import secrets
import sqlite3
import time
from collections.abc import Generator
from pathlib import Path

import msgspec

from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.fleet.info import iso

PREFIX = "pier_"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    mac TEXT NOT NULL UNIQUE,
    created REAL NOT NULL,
    revoked REAL
) STRICT
"""


class KeyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is listed: never its text. Times are ISO 8601 UTC."""

    id: str
    name: str
    created: str
    revoked: str | None = None


class NewKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key just made; ``key`` is its text, which is shown this once."""

    id: str
    name: str
    key: str
    created: str


def mac(pepper: bytes, key: str) -> str:
    """The hex HMAC-SHA256 of a key's text."""
    return hmac.digest(pepper, key.encode(), "sha256").hex()


class Keys:
    """The keys of this installation, in its database; blocking, safe to use from several processes."""

    def __init__(self, database: Path, pepper_file: Path) -> None:
        self._database = database
        self._pepper_file = pepper_file

    def create(self, name: str) -> NewKey:
        """Make a key of 256 random bits; UsageError for a name that is empty or taken."""
        name = name.strip()
        if not name or len(name) > 100 or not name.isprintable():
            raise UsageError(
                "a key needs a name of 1 to 100 printable characters", hint="Try `pier key create laptop`."
            )
        text = PREFIX + secrets.token_urlsafe(32)
        new = NewKey(id="key_" + secrets.token_hex(6), name=name, key=text, created=iso(time.time()))
        with self._open() as database:
            taken = database.execute("SELECT 1 FROM keys WHERE name = ? AND revoked IS NULL", (name,)).fetchone()
            if taken:
                raise UsageError(f"a key named '{name}' exists", hint="Choose another name, or revoke that key first.")
            database.execute(
                "INSERT INTO keys (id, name, mac, created) VALUES (?, ?, ?, ?)",
                (new.id, name, mac(self.pepper(), text), time.time()),
            )
        return new

    def list(self) -> list[KeyInfo]:
        """All keys that hold, oldest first."""
        if not self._database.exists():
            return []
        with self._open() as database:
            rows = database.execute("SELECT id, name, created FROM keys WHERE revoked IS NULL ORDER BY created, id")
            return [KeyInfo(id=i, name=n, created=iso(c)) for i, n, c in rows]

    def revoke(self, name: str) -> KeyInfo:
        """End the key with this id or name; NotFound when none holds."""
        with self._open() as database:
            row = database.execute(
                "SELECT id, name, created FROM keys WHERE (id = ? OR name = ?) AND revoked IS NULL", (name, name)
            ).fetchone()
            if row is None:
                raise NotFound(f"there is no key '{name}'", hint="`pier key list` shows the keys that hold.")
            now = time.time()
            database.execute("UPDATE keys SET revoked = ? WHERE id = ?", (now, row[0]))
            return KeyInfo(id=row[0], name=row[1], created=iso(row[2]), revoked=iso(now))

    def macs(self) -> list[tuple[str, str]]:
        """(id, hex HMAC) of every key that holds."""
        if not self._database.exists():
            return []
        with self._open() as database:
            return list(database.execute("SELECT id, mac FROM keys WHERE revoked IS NULL ORDER BY id"))

    def pepper(self) -> bytes:
        """The secret that the hashes are made with; made on first use, readable by its owner only."""
        with contextlib.suppress(FileNotFoundError):
            return self._read_pepper()
        temporary = self._pepper_file.with_name(f".{self._pepper_file.name}.{secrets.token_hex(4)}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, self._pepper_file)  # the first one wins
        temporary.unlink()
        return self._read_pepper()

    def _read_pepper(self) -> bytes:
        pepper = self._pepper_file.read_bytes()
        if len(pepper) != 32:
            raise CorruptData(
                f"the key secret {self._pepper_file} is damaged",
                hint="Restore it from a backup; or delete it and make all keys anew.",
            )
        return pepper

    @contextlib.contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        # SQLite's own waiting does not cover the switch to WAL, so one user at a time gets in.
        guard = os.open(self._database.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            os.close(os.open(self._database, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            with contextlib.closing(sqlite3.connect(self._database, timeout=10)) as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = FULL")
                with database:
                    database.execute("BEGIN IMMEDIATE")
                    database.execute(_SCHEMA)
                    yield database
        except sqlite3.DatabaseError as exc:
            raise CorruptData(
                f"cannot use the database {self._database}: {exc}",
                hint=f"Restore {self._database} from a backup, or move it away to start with no keys.",
            ) from exc
        finally:
            os.close(guard)
