"""Names move, digests do not: earlier versions stay, the log tells when, and what is said of a model lives with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pierhead.errors import NotFound
from pierhead.store.layout import Store
from pierhead.store.media import GGUF
from pierhead.store.model import Layer, ModelRecord


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def add(store: Store, name: str, data: bytes) -> ModelRecord:
    with store.ingest(f"{name} {data[:20]!r}") as ingest:
        ingest.write(data)
        blob = ingest.commit()
    return store.commit_model(
        name,
        layers=[Layer(blob.digest, blob.size, GGUF, "m.gguf")],
        metadata={},
        annotations={"ai.pierhead.source": "t"},
    )


def statement(store: Store, subject: ModelRecord) -> bytes:
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": store.blobs.put(b"{}").digest, "size": 2}
    about = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": subject.digest,
        "size": store.blob_path(subject.digest).stat().st_size,
    }
    kind = "application/spdx+json"
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": kind,
            "config": empty,
            "layers": [],
            "subject": about,
        }
    ).encode()


def test_a_name_that_moves_keeps_its_earlier_version_and_one_command_goes_back(store: Store) -> None:
    one, two = add(store, "m", b"one"), add(store, "m", b"two")
    assert store.get("m").digest == two.digest
    assert [v.digest for v in store.versions("m")] == [one.digest]
    assert store.get(f"m@{one.digest}").name == f"m@{one.digest}"
    store.tag(f"m@{one.digest}", "m")
    assert store.get("m").digest == one.digest
    assert [v.digest for v in store.versions("m")] == [two.digest]


def test_the_log_tells_where_a_name_pointed_and_when(store: Store) -> None:
    one, two = add(store, "m", b"one"), add(store, "m", b"two")
    store.note("m", by="pull", source="t")
    store.remove("m")
    assert [(m.by, m.digest) for m in store.history("m")] == [
        ("rm", ""), ("pull", two.digest), ("pull", two.digest), ("pull", one.digest),
    ]  # fmt: skip


def test_a_log_that_grew_too_long_still_tells_where_models_came_from(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policies ask that at each start: a model must not lose its origin by many moves of other names."""
    monkeypatch.setattr("pierhead.store.history.MAX_BYTES", 20_000)
    one, gone = add(store, "m", b"one"), add(store, "gone", b"two")
    store.note("m", by="pull", source="oci://evil.example/m/m:1")
    store.note("gone", by="pull", source="oci://evil.example/gone/gone:1")
    store.remove("gone")
    for _ in range(400):
        store.note("m", by="check", source="t")
    assert (store.root / "history.jsonl").stat().st_size < 21_000
    assert "oci://evil.example/m/m:1" in store.pulled_from(one.digest)
    assert store.pulled_from(gone.digest) == ()


def test_a_move_that_a_dying_process_announced_but_did_not_make_is_not_told(tmp_path: Path) -> None:
    armed: list[str] = []

    def step(name: str) -> None:
        if armed and name == armed[0]:
            raise KeyboardInterrupt

    store = Store.open(tmp_path / "store", step)
    one = add(store, "m", b"one")
    armed.append("model:history")
    with pytest.raises(KeyboardInterrupt):
        add(store, "m", b"two")
    armed.clear()
    with (store.root / "history.jsonl").open("ab") as log:
        log.write(b'{"time": "torn')
    three = add(store, "m", b"three")
    assert [m.digest for m in store.history("m")] == [three.digest, one.digest]


def test_removing_another_model_leaves_earlier_versions_alone_and_prune_takes_them(store: Store) -> None:
    one, two = add(store, "m", b"one"), add(store, "m", b"two")
    add(store, "other", b"other")
    store.remove("other")
    assert store.get(one.digest).digest == one.digest
    store.prune()
    with pytest.raises(NotFound):
        store.get(one.digest)
    assert store.verify("m") == []
    assert store.get("m").digest == two.digest


def test_no_more_earlier_versions_stay_than_the_limit(store: Store) -> None:
    made = [add(store, "m", b"%d" % n) for n in range(6)]
    assert [v.digest for v in store.versions("m")] == [m.digest for m in reversed(made[2:5])]


def test_a_pinned_earlier_version_outlives_a_prune(store: Store) -> None:
    one = add(store, "m", b"one")
    add(store, "m", b"two")
    store.pin(one.digest, "replica1")
    store.prune()
    assert store.blob_path(one.files[0].digest).exists()


def test_what_is_said_about_a_model_goes_with_it(store: Store) -> None:
    one = add(store, "m", b"one")
    said = store.attach(one.digest, statement(store, one))
    assert store.referrers(one.digest) == [said]
    assert [r.name for r in store.models()] == ["m"]
    store.collect()
    assert store.has(said.digest)
    store.remove("m")
    assert not store.has(said.digest)
    assert store.referrers(one.digest) == []


def test_a_blob_that_a_pull_finds_counts_as_new_to_the_collector(store: Store) -> None:
    digest = add(store, "m", b"one").files[0].digest
    before = store.blob_path(digest).stat()
    with store.ingest("again", digest=digest) as ingest:
        assert ingest.done is not None
    after = store.blob_path(digest).stat()
    assert after.st_ctime_ns > before.st_ctime_ns
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_what_is_said_may_come_before_its_model_while_a_lease_lasts(store: Store) -> None:
    one = add(store, "m", b"one")
    manifest = statement(store, one)
    store.remove("m")
    with store.lease():
        said = store.attach(one.digest, manifest, [b"{}"])
        store.collect()
        assert store.referrers(one.digest) == [said]
    store.collect()
    assert store.referrers(one.digest) == []
    assert not store.has(said.digest)
