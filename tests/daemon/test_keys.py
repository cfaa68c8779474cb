"""API keys: random, shown once, kept as a keyed hash."""

from __future__ import annotations

import concurrent.futures
import datetime
import os
import sqlite3
import stat
import time
from pathlib import Path

import pytest

from pierhead.daemon.keys import Keys, mac
from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.gateway.grants import Wanted, budget, duration, expiry, grants, show_budget
from pierhead.gateway.ledger import Row, SqliteLedger, span
from pierhead.gateway.link import Budget, Grants


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "pierhead.db", tmp_path / "pepper")


def test_a_key_has_256_random_bits_and_only_its_hash_is_stored(keys: Keys, tmp_path: Path) -> None:
    new = keys.create("laptop")
    assert new.key.startswith("pier_")
    assert len(new.key) == len("pier_") + 43
    assert [(k.id, k.mac) for k in keys.accepted()] == [(new.id, mac(keys.pepper(), new.key))]
    assert all(new.key.encode() not in p.read_bytes() for p in tmp_path.iterdir())
    assert new.key not in repr(keys.list())


def test_files_of_keys_are_for_their_owner_only(keys: Keys, tmp_path: Path) -> None:
    keys.create("laptop")
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}


def test_a_revoked_key_no_longer_holds_and_its_name_is_free_again(keys: Keys) -> None:
    old = keys.create("ci")
    assert keys.revoke("ci").revoked is not None
    assert keys.accepted() == ()
    assert keys.list() == []
    new = keys.create("ci")
    assert new.id != old.id
    assert [k.id for k in keys.list()] == [new.id]


def test_revoking_what_is_not_there_says_how_to_list(keys: Keys) -> None:
    with pytest.raises(NotFound, match="no key 'x'") as caught:
        keys.revoke("x")
    assert "pier key list" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 101])
def test_a_bad_name_is_refused(keys: Keys, name: str) -> None:
    with pytest.raises(UsageError):
        keys.create(name)


def test_two_keys_do_not_share_a_name(keys: Keys) -> None:
    keys.create("a")
    with pytest.raises(UsageError, match="exists"):
        keys.create("a")


def test_many_at_once_agree_on_one_pepper_and_lose_no_key(keys: Keys) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: keys.create(f"k{n}"), range(16)))
    pepper = keys.pepper()
    assert sorted((k.id, k.mac) for k in keys.accepted()) == sorted((k.id, mac(pepper, k.key)) for k in made)


def test_without_a_database_there_are_no_keys_and_none_is_made(keys: Keys, tmp_path: Path) -> None:
    assert keys.list() == []
    assert keys.accepted() == ()
    assert os.listdir(tmp_path) == []


def test_a_damaged_database_or_pepper_is_named(keys: Keys, tmp_path: Path) -> None:
    keys.create("a")
    (tmp_path / "pepper").write_bytes(b"short")
    with pytest.raises(CorruptData, match="pepper"):
        keys.pepper()
    for path in tmp_path.glob("pierhead.db*"):
        path.unlink()
    (tmp_path / "pierhead.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(CorruptData, match=r"pierhead\.db"):
        keys.list()


def test_the_database_keeps_a_write_ahead_log(keys: Keys, tmp_path: Path) -> None:
    keys.create("a")
    database = sqlite3.connect(tmp_path / "pierhead.db")
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_what_a_key_may_do_is_kept_changed_and_shown(keys: Keys) -> None:
    wanted = Wanted(models=("smol*",), rpm=60, budgets=("5usd/month", "1M tokens/day"), admin=True, expires="30d")
    new = keys.create("ci", wanted)
    info = keys.get("ci")
    assert info == keys.list()[0]
    assert (info.models, info.rpm, info.admin) == (("smol*",), 60, True)
    assert info.budgets == ("5usd/month", "1000000tokens/day")
    assert info.expires is not None
    changed = keys.edit(new.id, Wanted(rpm=0, budgets=(), expires="never"))
    assert (changed.rpm, changed.budgets, changed.expires, changed.models) == (0, (), None, ("smol*",))
    (key,) = keys.accepted()
    assert key.grants == Grants(models=("smol*",), admin=True)
    assert key.name == "ci"


def test_a_rotated_key_keeps_its_id_and_the_old_text_holds_for_the_grace(keys: Keys) -> None:
    old = keys.create("ci", Wanted(rpm=3))
    new = keys.rotate("ci", grace=60)
    pepper = keys.pepper()
    (key,) = keys.accepted()
    assert (key.id, key.mac, key.old_mac) == (old.id, mac(pepper, new.key), mac(pepper, old.key))
    assert time.time() < key.old_until <= time.time() + 60
    assert key.grants.rpm == 3
    assert keys.get("ci").old_until is not None
    last = keys.rotate("ci")
    (key,) = keys.accepted()
    assert (key.mac, key.old_mac) == (mac(pepper, last.key), "")


def test_a_database_from_before_scopes_opens_and_its_keys_are_no_admins(keys: Keys, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "pierhead.db") as database:
        database.execute(
            "CREATE TABLE keys (id TEXT PRIMARY KEY, name TEXT NOT NULL, mac TEXT NOT NULL UNIQUE, "
            "created REAL NOT NULL, revoked REAL) STRICT"
        )
        database.execute("INSERT INTO keys VALUES ('key_1', 'old', 'ab', 1.0, NULL)")
    database.close()
    (key,) = keys.accepted()
    assert (key.id, key.mac, key.grants) == ("key_1", "ab", Grants())
    assert not keys.get("old").admin
    assert keys.edit("old", Wanted(admin=True)).admin


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("1000000tokens/day", Budget(1_000_000)),
        ("1 token / month", Budget(1, "tokens", "month")),
        ("2.5Mtokens/day", Budget(2_500_000)),
        ("1_000 requests/day", Budget(1000, "requests")),
        ("5usd/month", Budget(5_000_000, "usd", "month")),
        ("$0.25/day", Budget(250_000, "usd")),
        ("0.000001usd/day", Budget(1, "usd")),
    ],
)
def test_budgets_are_read_as_people_write_them(text: str, made: Budget) -> None:
    assert budget(text) == made
    assert budget(show_budget(made)) == made


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "5usd",
        "5/day",
        "0tokens/day",
        "-1tokens/day",
        "1.5tokens/day",
        "$5tokens/day",
        "5usd/year",
        "9" * 40 + "usd/day",
        "0.0000001usd/day",
        "nan usd/day",
    ],
)
def test_what_is_no_budget_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        budget(text)
    assert caught.value.hint


def test_durations_and_dates_are_read() -> None:
    assert [duration(t) for t in ("90s", "2min", "1.5h", "1d", "2w")] == [90, 120, 5400, 86400, 1209600]
    now = 1_800_000_000.0
    assert expiry("1h", now) == now + 3600
    assert expiry("never", now) == 0
    assert expiry("2030-01-01", now) == 1893542400.0  # the day's end, in UTC
    assert expiry("2030-01-01T00:00:00Z", now) == 1893456000.0
    for bad in ("soon", "2020-01-01", "1y"):
        with pytest.raises(UsageError):
            expiry(bad, now)


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(dialects=("cobol",)),
        Wanted(rpm=-1),
        Wanted(models=("",)),
        Wanted(priority=101),
        Wanted(budgets=("1tokens/day", "2tokens/day")),
    ],
)
def test_grants_that_make_no_sense_are_refused(keys: Keys, wanted: Wanted) -> None:
    with pytest.raises(UsageError):
        keys.create("a", wanted)
    with pytest.raises(UsageError):
        grants(wanted)
    assert keys.list() == []


def test_a_key_tells_what_is_spent_and_left_of_its_budgets_and_when_they_renew(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "pierhead.db", tmp_path / "pepper", tmp_path / "budgets.db")
    new = keys.create("ci", Wanted(budgets=("1000tokens/day", "5usd/month", "9requests/day")))
    assert [(s.spent, s.left) for s in keys.get("ci").spent] == [(0, 1000), (0, 5), (0, 9)], "nobody has spent yet"
    ledger = SqliteLedger(tmp_path / "budgets.db")
    now = time.time()
    day, month = span("day", now), span("month", now)
    ledger.lease(Row(new.id, "tokens", day.label), 1000, 400, 400)
    ledger.lease(Row(new.id, "tokens", span("day", now - 86400).label), 1000, 300, 300)
    ledger.lease(Row(new.id, "usd", month.label), 5_000_000, 1_250_000, 1_250_000)
    ledger.lease(Row("another", "requests", day.label), 9, 9, 9)
    ledger.close()
    tokens, dollars, requests = keys.get("ci").spent
    assert (tokens.budget, tokens.spent, tokens.left, tokens.limit) == ("1000tokens/day", 400, 600, 1000)
    assert datetime.datetime.fromisoformat(tokens.resets).timestamp() == day.until
    assert (dollars.spent, dollars.left) == (1.25, 3.75)
    assert datetime.datetime.fromisoformat(dollars.resets).timestamp() == month.until
    assert requests.left == 9
    assert keys.edit(new.id, Wanted(budgets=("100tokens/day",))).spent[0].left == 0, "a smaller one is used up"


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "pierhead.db", tmp_path / "pepper", tmp_path / "budgets.db")
    keys.create("ci", Wanted(budgets=("1000tokens/day",)))
    (tmp_path / "budgets.db").write_bytes(b"no database" * 1000)
    with pytest.raises(CorruptData, match=r"budgets\.db"):
        keys.get("ci")
