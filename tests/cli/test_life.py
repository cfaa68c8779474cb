"""What happens to names after their models came: they move, are looked back at, and their leftovers go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.sources.servers import make_gguf

from pierhead.paths import resolve
from pierhead.store.layout import Store
from pierhead.store.media import GGUF
from pierhead.store.model import Layer, ModelRecord

from .conftest import Pier, command, environment


def add(store: Store, name: str, data: bytes, source: str = "file:/x.gguf") -> ModelRecord:
    with store.lease(), store.ingest(f"{name} {data[:20]!r}") as ingest:
        ingest.write(data)
        blob = ingest.commit()
        layers = [Layer(blob.digest, blob.size, GGUF, "m.gguf")]
        return store.commit_model(
            name, layers=layers, metadata={"format": "gguf"}, annotations={"ai.pierhead.source": source}
        )


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Pier, Store, ModelRecord, ModelRecord]:
    """A home in which the name m moved from one model to another."""
    env = environment(tmp_path / "home")
    store = Store.open(resolve(env).store)
    return command(env), store, add(store, "m", b"one" * 100_000), add(store, "m", b"two" * 100_000)


def test_history_shows_where_a_name_pointed_and_tag_goes_back(
    moved: tuple[Pier, Store, ModelRecord, ModelRecord],
) -> None:
    pier, store, one, two = moved
    told = json.loads(pier("history", "m", "--json").stdout)
    assert [(m["digest"], m["state"], m["by"]) for m in told] == [
        (two.digest, "current", "pull"), (one.digest, "here", "pull"),
    ]  # fmt: skip
    assert told[0]["source"] == "file:/x.gguf"
    assert "       2  " in pier("list").stdout
    back = pier("tag", f"m@{one.digest}", "m")
    assert back.returncode == 0, back.stderr
    assert store.get("m").digest == one.digest
    lines = pier("history", "m").stdout.splitlines()
    assert [line.split("  ")[2].strip() for line in lines[1:]] == ["tag", "pull", "pull"]
    assert "here" in lines[2]


def test_prune_says_what_goes_by_model_and_a_dry_run_changes_nothing(
    moved: tuple[Pier, Store, ModelRecord, ModelRecord],
) -> None:
    pier, store, one, _two = moved
    said = json.loads(pier("prune", "--dry-run", "--json").stdout)
    assert store.has(one.digest)
    done = json.loads(pier("prune", "--json").stdout)
    assert {**said, "dry_run": False} == done
    assert list(done["models"]) == [f"m@{one.digest}"]
    assert done["freed"] >= 300_000
    assert not store.has(one.digest)
    assert store.verify("m") == []
    assert [m["state"] for m in json.loads(pier("history", "m", "--json").stdout)] == ["current", "gone"]
    gone = pier("tag", f"m@{one.digest}", "m")
    assert gone.returncode == 3
    assert "pier history m" in gone.stderr


def test_prune_keeps_as_many_earlier_versions_as_it_is_told_and_partials_unless_all(
    moved: tuple[Pier, Store, ModelRecord, ModelRecord],
) -> None:
    pier, store, one, _ = moved
    with store.ingest("half") as ingest:
        ingest.write(os.urandom(5000))
    assert pier("prune", "--keep", "1").returncode == 0
    assert store.has(one.digest)
    assert ingest.part.exists()
    assert "interrupted" in pier("prune", "--keep", "1", "--all").stdout
    assert not ingest.part.exists()


def test_rm_takes_one_earlier_version_and_refuses_the_current_one_by_digest(
    moved: tuple[Pier, Store, ModelRecord, ModelRecord],
) -> None:
    pier, store, one, two = moved
    refused = pier("rm", f"m@{two.digest}")
    assert refused.returncode == 4
    assert "pier rm m" in refused.stderr
    assert pier("rm", f"m@{one.digest}").returncode == 0
    assert not store.has(one.digest)
    assert store.get("m").digest == two.digest
    assert pier("rm", "--force", "ghost", "m").returncode == 0
    assert store.models() == []
    assert json.loads(pier("history", "m", "--json").stdout)[0]["by"] == "rm"


def test_what_a_replica_uses_is_not_removed(moved: tuple[Pier, Store, ModelRecord, ModelRecord]) -> None:
    pier, store, one, _two = moved
    store.pin(one.digest, "replica1")
    for word in (f"m@{one.digest}", "m"):
        refused = pier("rm", word)
        assert refused.returncode == 4, word
        assert "replica1" in refused.stderr
    assert store.verify("m") == []
    assert [m.by for m in store.history("m")] == ["pull", "pull"]
    pier("prune")
    assert store.has(one.digest)
    store.unpin("replica1")
    pier("prune")
    assert not store.has(one.digest)


def test_models_go_to_another_home_in_an_archive(
    moved: tuple[Pier, Store, ModelRecord, ModelRecord], tmp_path: Path
) -> None:
    pier, store, _, _ = moved
    made = add(store, "real", make_gguf(9000))
    file = str(tmp_path / "a.tar")
    done = json.loads(pier("export", "real", "-o", file, "--json").stdout)
    assert (done["names"], done["blobs"]) == (["real"], 3)
    other = command(environment(tmp_path / "other"))
    assert other("import", file).stdout.split() == [made.digest]
    assert json.loads(other("import", file, "--name", "mine", "--json").stdout)[0]["names"] == ["mine", "real"]
    for words in (("export", "ghost", "-o", file), ("export", "real", "-o", "-", "--json"), ("import", "/not/there")):
        refused = pier(*words)
        assert refused.returncode in (2, 3), words
        assert "Traceback" not in refused.stderr
    (tmp_path / "bad").write_bytes(b"not a tar")
    assert other("import", str(tmp_path / "bad")).returncode == 5


def test_diff_tells_two_models_apart_as_diff_does(moved: tuple[Pier, Store, ModelRecord, ModelRecord]) -> None:
    pier, _, one, two = moved
    same = pier("diff", "m", f"m@{two.digest}")
    assert (same.returncode, same.stdout) == (0, "The same.\n")
    other = pier("diff", f"m@{one.digest}", "m", "--json")
    assert other.returncode == 1, other.stderr
    assert [f["change"] for f in json.loads(other.stdout)["files"]] == ["changed"]
    shown = pier("diff", f"m@{one.digest}", "m")
    assert shown.returncode == 1
    assert "~" in shown.stdout
    assert pier("diff", "m", "./ghost.gguf").returncode == 3


def test_list_takes_patterns_and_asks_nobody_by_itself(moved: tuple[Pier, Store, ModelRecord, ModelRecord]) -> None:
    pier, store, _, _ = moved
    store.tag("m", "team/other:v1")
    assert pier("list", "team/*", "--quiet").stdout.split() == ["team/other:v1"]
    assert "Nothing matches" in pier("list", "x*").stderr
    (told,) = json.loads(pier("list", "--check", "--json").stdout)
    assert (told["state"], told["names"]) == ("fixed", ["m", "team/other:v1"])
    assert json.loads(pier("list", "--stale", "--json").stdout) == []


def test_df_tells_what_is_whose_and_fsck_what_is_damaged(
    moved: tuple[Pier, Store, ModelRecord, ModelRecord],
) -> None:
    pier, store, one, two = moved
    store.tag("m", "twin")
    shares = {s["name"]: s for s in json.loads(pier("df", "--json").stdout)["shares"]}
    assert set(shares) == {"m", f"m@{one.digest}"}
    assert shares["m"]["unique"] == shares["m"]["size"] > 300_000
    assert shares["m"]["names"] == ["m", "twin"]
    assert "OWN" in pier("df", "-v").stdout
    assert "whole" in pier("fsck").stderr
    path = store.blob_path(two.files[0].digest)
    path.chmod(0o644)
    path.write_bytes(b"x" * 300_000)
    found = pier("fsck")
    assert found.returncode == 5
    assert "pier fsck --repair" in found.stderr
    assert f"{two.files[0].digest[:19]} is damaged: m, twin" in found.stdout
    mended = pier("fsck", "--repair")
    assert mended.returncode == 0
    assert "pier pull file:/x.gguf --name m" in mended.stderr
