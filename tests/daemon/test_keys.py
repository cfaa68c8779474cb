"""API keys: random, shown once, kept as a keyed hash."""

from __future__ import annotations

import concurrent.futures
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from pierhead.daemon.keys import Keys, mac
from pierhead.errors import CorruptData, NotFound, UsageError


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "pierhead.db", tmp_path / "pepper")


def test_a_key_has_256_random_bits_and_only_its_hash_is_stored(keys: Keys, tmp_path: Path) -> None:
    new = keys.create("laptop")
    assert new.key.startswith("pier_")
    assert len(new.key) == len("pier_") + 43
    assert keys.macs() == [(new.id, mac(keys.pepper(), new.key))]
    assert all(new.key.encode() not in p.read_bytes() for p in tmp_path.iterdir())
    assert new.key not in repr(keys.list())


def test_files_of_keys_are_for_their_owner_only(keys: Keys, tmp_path: Path) -> None:
    keys.create("laptop")
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}


def test_a_revoked_key_no_longer_holds_and_its_name_is_free_again(keys: Keys) -> None:
    old = keys.create("ci")
    assert keys.revoke("ci").revoked is not None
    assert keys.macs() == []
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
    assert sorted(keys.macs()) == sorted((k.id, mac(pepper, k.key)) for k in made)


def test_without_a_database_there_are_no_keys_and_none_is_made(keys: Keys, tmp_path: Path) -> None:
    assert keys.list() == []
    assert keys.macs() == []
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
