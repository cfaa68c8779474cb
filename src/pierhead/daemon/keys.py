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
from typing import Any, Literal

import msgspec

from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.fleet.info import iso
from pierhead.gateway.grants import MILLION, Wanted, grants, show_budget
from pierhead.gateway.ledger import SqliteLedger, span
from pierhead.gateway.link import Budget, Grants, Key

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


# Columns that came later: older databases get them when they are opened.
_LATER = {"grants": "TEXT NOT NULL DEFAULT '{}'", "old_mac": "TEXT NOT NULL DEFAULT ''", "old_until": "REAL"}
_COLUMNS = "id, name, created, revoked, grants, old_until"


class Spent(msgspec.Struct, frozen=True):
    """Where a key stands with one budget: ``limit``, ``spent`` and ``left`` in its unit, ``resets`` as ISO 8601 UTC.

    What the gateway has borrowed of it to spend soon counts as spent.
    """

    budget: str
    unit: Literal["tokens", "usd", "requests"]
    limit: float
    spent: float
    left: float
    resets: str


class KeyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is listed: never its text. Times are ISO 8601 UTC; ``old_until``: the text before holds so long.

    Empty scopes allow every model and dialect; limits of 0 are none. ``spent`` is told of single keys only.
    """

    id: str
    name: str
    created: str
    revoked: str | None = None
    expires: str | None = None
    old_until: str | None = None
    models: tuple[str, ...] = ()
    dialects: tuple[str, ...] = ()
    admin: bool = False
    rpm: int = 0
    tpm: int = 0
    concurrent: int = 0
    priority: int = 0
    budgets: tuple[str, ...] = ()
    cache: bool = False
    spent: tuple[Spent, ...] = ()


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
    """The keys of this installation, in its database; blocking, safe to use from several processes.

    ``ledger`` is the file in which the gateway keeps what is spent of budgets.
    """

    def __init__(self, database: Path, pepper_file: Path, ledger: Path | None = None) -> None:
        self._database = database
        self._pepper_file = pepper_file
        self._ledger = ledger

    def create(self, name: str, wanted: Wanted | None = None) -> NewKey:
        """Make a key of 256 random bits; UsageError for a name that is empty or taken, or grants that make no sense."""
        name = name.strip()
        if not name or len(name) > 100 or not name.isprintable():
            raise UsageError(
                "a key needs a name of 1 to 100 printable characters", hint="Try `pier key create laptop`."
            )
        given = _encode(grants(wanted or Wanted()))
        text = PREFIX + secrets.token_urlsafe(32)
        new = NewKey(id="key_" + secrets.token_hex(6), name=name, key=text, created=iso(time.time()))
        with self._open() as database:
            taken = database.execute("SELECT 1 FROM keys WHERE name = ? AND revoked IS NULL", (name,)).fetchone()
            if taken:
                raise UsageError(f"a key named '{name}' exists", hint="Choose another name, or revoke that key first.")
            database.execute(
                "INSERT INTO keys (id, name, mac, created, grants) VALUES (?, ?, ?, ?, ?)",
                (new.id, name, mac(self.pepper(), text), time.time(), given),
            )
        return new

    def list(self) -> list[KeyInfo]:
        """All keys that are not revoked, oldest first."""
        if not self._database.exists():
            return []
        with self._open() as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM keys WHERE revoked IS NULL ORDER BY created, id")  # noqa: S608
            return [_info(row) for row in rows]

    def get(self, name: str) -> KeyInfo:
        """The key with this id or name; NotFound when none holds."""
        with self._open() as database:
            row = _row(database, name)
        return self._with_spent(row)

    def edit(self, name: str, wanted: Wanted) -> KeyInfo:
        """Change what the key with this id or name may do."""
        with self._open() as database:
            row = _row(database, name)
            changed = grants(wanted, _decode(row[4]))
            database.execute("UPDATE keys SET grants = ? WHERE id = ?", (_encode(changed), row[0]))
        return self._with_spent((*row[:4], _encode(changed), row[5]))

    def _with_spent(self, row: tuple[Any, ...]) -> KeyInfo:
        budgets = _decode(row[4]).budgets
        if not budgets or self._ledger is None:
            return _info(row)
        ledger = SqliteLedger(self._ledger)
        try:
            used = ledger.used(row[0])
        except OSError as exc:
            raise CorruptData(
                f"cannot read what the key has spent: {exc}",
                hint=f"Restore {self._ledger} from a backup, or move it away to let all budgets begin anew.",
            ) from exc
        finally:
            ledger.close()
        return msgspec.structs.replace(_info(row), spent=tuple(_spent(budget, used, time.time()) for budget in budgets))

    def rotate(self, name: str, grace: float = 0.0) -> NewKey:
        """A new text for the key with this id or name; the old one holds for ``grace`` seconds more."""
        text = PREFIX + secrets.token_urlsafe(32)
        with self._open() as database:
            row = _row(database, name)
            database.execute(
                "UPDATE keys SET old_mac = iif(? > 0, mac, ''), old_until = ?, mac = ? WHERE id = ?",
                (grace, time.time() + grace if grace > 0 else None, mac(self.pepper(), text), row[0]),
            )
        return NewKey(id=row[0], name=row[1], key=text, created=iso(row[2]))

    def revoke(self, name: str) -> KeyInfo:
        """End the key with this id or name; NotFound when none holds."""
        with self._open() as database:
            row = _row(database, name)
            now = time.time()
            database.execute("UPDATE keys SET revoked = ? WHERE id = ?", (now, row[0]))
            return _info((*row[:3], now, *row[4:]))

    def accepted(self) -> tuple[Key, ...]:
        """Every key that is not revoked, as the gateway needs it; the gateway minds when one expires."""
        if not self._database.exists():
            return ()
        with self._open() as database:
            rows = database.execute(
                "SELECT id, mac, name, old_mac, old_until, grants FROM keys WHERE revoked IS NULL ORDER BY id"
            )
            return tuple(Key(i, m, n, o, u or 0.0, _decode(g)) for i, m, n, o, u, g in rows)

    def names(self) -> dict[str, str]:
        """The name of every key that ever was, by id."""
        if not self._database.exists():
            return {}
        with self._open() as database:
            return dict(database.execute("SELECT id, name FROM keys"))

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
                    _migrate(database)
                    yield database
        except sqlite3.DatabaseError as exc:
            raise CorruptData(
                f"cannot use the database {self._database}: {exc}",
                hint=f"Restore {self._database} from a backup, or move it away to start with no keys.",
            ) from exc
        finally:
            os.close(guard)


def _spent(budget: Budget, used: dict[tuple[str, str], int], now: float) -> Spent:
    current = span(budget.window, now)
    spent = used.get((budget.unit, current.label), 0)
    scale = MILLION if budget.unit == "usd" else 1
    limit, gone, left = (n / scale if scale > 1 else n for n in (budget.amount, spent, max(0, budget.amount - spent)))
    return Spent(show_budget(budget), budget.unit, limit, gone, left, iso(current.until))


def _migrate(database: sqlite3.Connection) -> None:
    have = {row[1] for row in database.execute("PRAGMA table_info(keys)")}
    for column, kind in _LATER.items():
        if column not in have:
            database.execute(f"ALTER TABLE keys ADD COLUMN {column} {kind}")


def _row(database: sqlite3.Connection, name: str) -> tuple[Any, ...]:
    row = database.execute(
        f"SELECT {_COLUMNS} FROM keys WHERE (id = ? OR name = ?) AND revoked IS NULL",  # noqa: S608
        (name, name),
    ).fetchone()
    if row is None:
        raise NotFound(f"there is no key '{name}'", hint="`pier key list` shows the keys that hold.")
    return row


def _encode(value: Grants) -> str:
    return msgspec.json.encode(value).decode()


def _decode(text: str) -> Grants:
    try:
        return msgspec.json.decode(text, type=Grants)
    except msgspec.MsgspecError as exc:
        raise CorruptData(
            f"what a key may do cannot be read: {exc}", hint="Restore the database, or revoke it."
        ) from exc


def _info(row: tuple[Any, ...]) -> KeyInfo:
    given = _decode(row[4])
    return KeyInfo(
        id=row[0],
        name=row[1],
        created=iso(row[2]),
        revoked=iso(row[3]) if row[3] else None,
        expires=iso(given.expires) if given.expires else None,
        old_until=iso(row[5]) if row[5] and row[5] > time.time() else None,
        models=given.models,
        dialects=given.dialects,
        admin=given.admin,
        rpm=given.rpm,
        tpm=given.tpm,
        concurrent=given.concurrent,
        priority=given.priority,
        budgets=tuple(show_budget(budget) for budget in given.budgets),
        cache=given.cache,
    )
