"""Damage on the disk is found, said with the command that mends it, and put away without a sound byte being lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pierhead.errors import AccessDenied, CorruptData, NotFound, PierError
from pierhead.store.fsck import Damage, advice
from pierhead.store.layout import Store
from pierhead.store.media import GGUF
from pierhead.store.model import Layer, ModelRecord


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def add(store: Store, name: str, data: bytes) -> ModelRecord:
    with store.lease(), store.ingest(f"key {data[:20]!r}") as ingest:
        ingest.write(data)
        blob = ingest.commit()
        layers = [Layer(blob.digest, blob.size, GGUF, "m.gguf")]
        told = {"ai.pierhead.source": "oci://there/m:v1"}
        return store.commit_model(name, layers=layers, metadata={"format": "gguf"}, annotations=told)


def look(store: Store, **how: bool) -> list[Damage]:
    return store.fsck(lambda *_: None, **how)


def overwrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = change(path.read_bytes())
    path.unlink()
    path.write_bytes(data)


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def test_a_sound_store_has_nothing_to_say(store: Store) -> None:
    add(store, "m", b"one" * 100)
    add(store, "m", b"two" * 100)
    assert look(store) == []
    assert look(store, repair=True) == []
    assert len(list(store.blobs.folder.iterdir())) == 6


@pytest.mark.parametrize(
    ("change", "kind", "quick"),
    [(flip, "damaged", False), (lambda d: d[:-1], "truncated", True), (None, "missing", True)],
)
def test_damaged_weights_are_named_and_put_away_and_a_pull_brings_them_again(
    store: Store, change: Callable[[bytes], bytes] | None, kind: str, quick: bool
) -> None:
    made, kept = add(store, "m", b"one" * 100), add(store, "kept", b"two" * 100)
    store.materialize(made)
    path = store.blob_path(made.files[0].digest)
    overwrite(path, change) if change else path.unlink()
    (found,) = look(store, quick=quick)
    assert (found.kind, found.names, found.document) == (kind, ("m",), False)
    assert advice(found) == "pier pull oci://there/m:v1 --name m"
    assert look(store, repair=True) == [found]
    assert not path.exists()
    assert not (store.root / "models" / made.digest[7:]).exists()
    assert store.get("m").digest == made.digest, "the name stays: a pull fills it again"
    assert add(store, "m", b"one" * 100).files == made.files
    assert look(store) == []
    assert store.verify("kept") == []
    assert store.get("kept") == kept


def test_a_flip_is_what_the_quick_check_does_not_see(store: Store) -> None:
    made = add(store, "m", b"one" * 100)
    overwrite(store.blob_path(made.files[0].digest), flip)
    assert look(store, quick=True) == []


@pytest.mark.parametrize("part", ["manifest", "config"])
def test_a_model_that_cannot_be_read_loses_its_name_and_no_other_does(store: Store, part: str) -> None:
    add(store, "m", b"old" * 100)
    made = add(store, "m", b"one" * 100)
    store.tag("m", "alias")
    add(store, "kept", b"two" * 100)
    names = {p.name for p in store.blobs.folder.iterdir()}
    digest = made.digest
    if part == "config":
        import json

        digest = json.loads(store.blob_path(made.digest).read_bytes())["config"]["digest"]
    overwrite(store.blob_path(digest), lambda d: d[:-2])
    if part == "manifest":
        with pytest.raises(CorruptData) as caught:
            store.get("m")
        assert "pier fsck --repair" in (caught.value.hint or "")
        assert [(r.name, bool(r.damaged)) for r in store.models()] == [("alias", True), ("kept", False)]
    (found,) = look(store)
    assert (found.document, found.names) == (True, ("m", "alias"))
    look(store, repair=True)
    assert [r.name for r in store.models()] == ["kept"]
    assert [v.files[0].size for v in store.versions("m")] == [300], "its earlier version is there to go back to"
    assert store.history("m")[0].by == "fsck"
    assert names - {p.name for p in store.blobs.folder.iterdir()} == {digest[7:]}
    assert look(store) == []


def test_a_linked_file_that_changed_is_told_apart_from_damage(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"mine")
    blob = store.adopt_file(file, link=True)
    store.commit_model("m", layers=[Layer(blob.digest, 4, GGUF, "m.gguf")], metadata={})
    file.write_bytes(b"evil!")
    (found,) = look(store)
    assert found.kind == "changed"
    look(store, repair=True)
    assert file.read_bytes() == b"evil!", "the user's file is the user's"
    with pytest.raises(NotFound):
        store.blob_path(blob.digest)


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user to become")
def test_a_store_that_can_only_be_read_can_be_checked_and_says_why_it_cannot_be_changed(
    store: Store, tmp_path: Path
) -> None:
    from tests.crash.crashing import in_child

    made = add(store, "m", b"one" * 100)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005 and folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    changes: list[Callable[[Store], object]] = [
        lambda s: s.remove("m"),
        lambda s: s.tag("m", "n"),
        lambda s: s.prune(),
        lambda s: s.note("m", by="pull"),
        lambda s: s.pin(made.digest, "r"),
        lambda s: s.ingest("k").__enter__(),
        lambda s: s.adopt_file(Path("/etc/hostname")),
    ]

    def work() -> None:
        os.setuid(65534)
        reader = Store.open(store.root)
        assert reader.get("m") == made
        assert reader.models()[0].name == "m"
        assert reader.usage().total
        assert reader.history("m")
        assert look(reader) == []
        for change in changes:
            with pytest.raises(PierError) as caught:
                change(reader)
            assert isinstance(caught.value, AccessDenied), caught.value
            assert caught.value.hint

    assert in_child(work) == 0
