"""The store: one step from invisible to visible, truth about bytes, and nothing lost when a process dies."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pierhead.errors import Conflict, CorruptData, NotFound, OutOfSpace, PierError, UsageError
from pierhead.store.files import locked, seized
from pierhead.store.layout import Store
from pierhead.store.manifest import check_filepath
from pierhead.store.media import GGUF
from pierhead.store.model import Layer, ModelRecord

SUMMARY = {"format": "gguf", "architecture": "llama", "parameters": 3, "quantization": "F32"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def add(store: Store, name: str, data: bytes = b"weights" * 1000, file: str = "model.gguf") -> ModelRecord:
    with store.ingest(f"key {name}") as ingest:
        ingest.write(data)
        blob = ingest.commit()
    layer = Layer(blob.digest, blob.size, GGUF, file)
    return store.commit_model(name, layers=[layer], metadata=SUMMARY, annotations={"ai.pierhead.source": "test"})


def test_a_committed_model_is_found_by_name_latest_and_digest(store: Store) -> None:
    made = add(store, "org/name:q4")
    assert store.get("org/name:q4") == made
    assert store.get(made.digest[:19]).digest == made.digest
    add(store, "plain")
    assert store.get("plain:latest").name == "plain"
    assert made.metadata == SUMMARY
    assert made.files[0].digest == "sha256:" + hashlib.sha256(b"weights" * 1000).hexdigest()


def test_nothing_is_visible_before_the_commit(store: Store) -> None:
    with store.ingest("k") as ingest:
        ingest.write(b"half")
    assert list(store.blobs.folder.iterdir()) == []
    assert store.models() == []


def test_an_interrupted_ingest_goes_on_where_it_stopped(store: Store) -> None:
    with store.ingest("k", size=6) as ingest:
        ingest.write(b"abc")
    with store.ingest("k", size=6) as ingest:
        assert ingest.resumed == 3
        ingest.write(b"def")
        assert ingest.commit().digest == "sha256:" + hashlib.sha256(b"abcdef").hexdigest()


def test_after_a_power_cut_only_durable_bytes_count(store: Store) -> None:
    with store.ingest("k", size=6) as ingest:
        ingest.write(b"abc")
        ingest.checkpoint()
        ingest.write(b"de")
        part = ingest.part
    mark = part.with_suffix(".mark")
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "boot": "an earlier boot"}))
    with store.ingest("k", size=6) as ingest:
        assert ingest.resumed == 3


def test_wrong_bytes_are_refused_and_not_kept(store: Store) -> None:
    expected = "sha256:" + hashlib.sha256(b"right").hexdigest()
    with store.ingest("k", digest=expected) as ingest:
        ingest.write(b"wrong")
        with pytest.raises(CorruptData, match="digest"):
            ingest.commit()
    with store.ingest("k", digest=expected) as ingest:
        assert ingest.offset == 0


def test_more_and_fewer_bytes_than_announced_are_refused(store: Store) -> None:
    with store.ingest("k", size=3) as ingest, pytest.raises(CorruptData, match="more than"):
        ingest.write(b"abcd")
    with store.ingest("l", size=3) as ingest:
        ingest.write(b"ab")
        with pytest.raises(CorruptData, match="ended after 2 of 3"):
            ingest.commit()


def test_a_download_that_cannot_fit_is_refused_before_it_starts(store: Store) -> None:
    with pytest.raises(OutOfSpace) as caught:
        store.ingest("k", size=1 << 60).__enter__()
    assert caught.value.data["needed"] == 1 << 60
    assert not list(store.blobs.ingests.glob("*.part"))


def test_the_collector_takes_partials_in_which_nothing_landed(store: Store) -> None:
    with store.ingest("empty") as ingest:
        empty = ingest.part
    with store.ingest("begun") as ingest:
        ingest.write(b"x")
        begun = ingest.part
    assert empty.exists()
    store.collect()
    assert not empty.exists()
    assert begun.read_bytes() == b"x"


def test_the_collector_takes_what_a_killed_quantizer_left_and_leaves_one_at_work(store: Store) -> None:
    code = "import os, sys, pathlib; from pierhead.store.layout import Store\n"
    code += "with Store.open(pathlib.Path(sys.argv[1])).scratch('quantize') as out:\n"
    code += "    (out / 'half.gguf').write_bytes(b'x' * 100_000)\n    os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(store.root)], check=False, timeout=30)
    left = [p for p in store.root.iterdir() if p.name.startswith(".quantize-")]
    assert len(left) == 1
    with store.scratch("convert") as at_work:
        assert store.prune(dry_run=True).freed >= 100_000
        assert store.prune().freed >= 100_000
        assert at_work.is_dir()
    assert not left[0].exists()
    assert not at_work.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up_gives_one_clear_error_and_a_readable_store(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        store = Store.open(disk / "store")
        with pytest.raises(OutOfSpace), store.ingest("k") as ingest:
            ingest.write(b"x" * (2 << 20))
        assert store.models() == []
        assert store.discard_partials() > 0
        add(store, "fits")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_transfers_of_one_thing_become_one(store: Store) -> None:
    waits = threading.Event()
    results: list[object] = []

    def second() -> None:
        with store.ingest("k", waiting=lambda part: (results.append(part.stat().st_size), waits.set())) as ingest:  # type: ignore[func-returns-value]
            results.append(ingest.done)

    with store.ingest("k") as ingest:
        ingest.write(b"abc")
        other = threading.Thread(target=second)
        other.start()
        assert waits.wait(10)
        blob = ingest.commit()
    other.join(10)
    assert results == [3, blob]


def test_a_transfer_that_failed_is_not_taken_for_an_earlier_one_that_ended(store: Store) -> None:
    """The same address may hold something else now: who waited in vain fetches it, and does not get the old bytes."""
    with store.ingest("k") as ingest:
        ingest.write(b"old")
        ingest.commit()
    waits = threading.Event()
    results: list[object] = []

    def second() -> None:
        with store.ingest("k", waiting=lambda _: waits.set()) as ingest:
            results.append(ingest.done)

    with store.ingest("k") as ingest:
        other = threading.Thread(target=second)
        other.start()
        assert waits.wait(10)
        ingest.abort()
    other.join(10)
    assert results == [None]


def test_a_model_folder_shares_the_bytes_and_is_made_once(store: Store) -> None:
    made = add(store, "m")
    folder = store.materialize(made)
    assert folder == store.materialize(made)
    assert (folder / "model.gguf").stat().st_ino == store.blob_path(made.files[0].digest).stat().st_ino
    assert not (folder / "model.gguf").stat().st_mode & 0o222
    assert store.usage().materialized == 0


def test_removing_the_last_name_frees_what_it_says(store: Store) -> None:
    made = add(store, "a", os.urandom(1 << 20))
    store.materialize(made)
    store.tag("a", "b")
    first = store.remove("a")
    assert first.kept == 1 << 20
    assert first.freed_bytes < 1 << 16
    before = store.usage().total
    second = store.remove("b")
    assert second.freed_bytes >= 1 << 20
    assert store.usage().total == before - second.freed_bytes
    assert list(store.blobs.folder.iterdir()) == []


def test_blobs_that_two_models_share_stay_until_both_are_gone(store: Store) -> None:
    add(store, "a")
    add(store, "b", file="other.gguf")
    store.remove("a")
    assert store.verify("b") == []


def test_a_pinned_model_is_not_removed(store: Store) -> None:
    made = add(store, "a")
    store.pin(made.digest, "replica1")
    with pytest.raises(Conflict, match="replica1"):
        store.remove("a")
    store.unpin("replica1")
    store.remove("a")


def test_who_has_a_model_beside_its_own_is_named_by_its_model(store: Store) -> None:
    model, adapter = add(store, "m"), add(store, "pirate", file="other.gguf")
    store.pin(model.digest, "r1")
    store.pin(adapter.digest, "r1-0")
    with pytest.raises(Conflict, match=r"'pirate' is in use by r1 \(m\)") as refused:
        store.remove("pirate")
    assert "`pier stop m` first, after `pier lora rm m pirate`" in (refused.value.hint or "")
    assert refused.value.data["owners"] == ["r1"]


def test_what_a_live_pull_has_fetched_is_not_garbage(store: Store) -> None:
    with store.lease():
        with store.ingest("k") as ingest:
            ingest.write(b"abc")
            blob = ingest.commit()
        store.collect()
        assert store.has(blob.digest)
    store.collect()
    assert not store.has(blob.digest)


def test_a_users_file_is_taken_in_and_stays_untouched(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"mine")
    blob = store.adopt_file(file)
    assert store.blob_path(blob.digest).read_bytes() == b"mine"
    assert os.access(file, os.W_OK)
    assert file.stat().st_nlink == 1


def test_a_linked_file_that_changes_later_is_noticed(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"mine")
    blob = store.adopt_file(file, link=True)
    record = store.commit_model("m", layers=[Layer(blob.digest, 4, GGUF, "m.gguf")], metadata={})
    store.recheck(record)
    assert store.blob_path(blob.digest).stat().st_ino == file.stat().st_ino
    file.write_bytes(b"evil!")
    with pytest.raises(CorruptData, match="changed"):
        store.recheck(record)


def test_removing_a_linked_model_says_that_the_users_file_stays(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(os.urandom(1 << 20))
    blob = store.adopt_file(file, link=True)
    store.commit_model("m", layers=[Layer(blob.digest, 1 << 20, GGUF, "m.gguf")], metadata={})
    removed = store.remove("m")
    assert removed.user_linked == 1 << 20
    assert removed.freed_bytes < 1 << 16
    assert file.exists()


def test_an_unknown_name_shows_the_closest_and_the_command(store: Store) -> None:
    add(store, "smollm2")
    with pytest.raises(NotFound) as caught:
        store.get("smolm2")
    assert caught.value.hint
    assert "smollm2" in caught.value.hint
    assert "pier pull" in caught.value.hint


@pytest.mark.parametrize("name", ["", "../x", "a b", "a//b", "/a", "a" * 300, "x\n", f"sha256:{'0' * 64}"])
def test_names_that_could_confuse_are_refused(store: Store, name: str) -> None:
    with pytest.raises(UsageError):
        store.tag("x", name)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", "", "a\x00b", "a\nb", "..", "a\\..\\b"])
def test_file_paths_never_leave_the_model_folder(path: str) -> None:
    with pytest.raises(CorruptData):
        check_filepath(path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"manifests":[{"mediaType":"x","digest":"../x","size":1}]}'])
def test_a_damaged_index_is_one_clear_error(store: Store, data: bytes) -> None:
    (store.root / "index.json").write_bytes(data)
    with pytest.raises(CorruptData) as caught:
        store.models()
    assert caught.value.hint


def test_a_damaged_manifest_names_the_model(store: Store) -> None:
    made = add(store, "m")
    path = store.blob_path(made.digest)
    path.chmod(0o644)
    path.write_bytes(b"{}")
    with pytest.raises(CorruptData, match="'m'"):
        store.get("m")


@pytest.mark.parametrize("lost", [False, True])
def test_a_damaged_model_hides_no_other_and_can_be_removed(store: Store, lost: bool) -> None:
    made, sound = add(store, "m", b"one"), add(store, "other", b"two")
    path = store.blob_path(made.digest)
    path.chmod(0o644)
    path.unlink() if lost else path.write_bytes(b"{}")
    first, second = store.models()
    assert (first.names, first.files) == (("m",), ())
    assert first.damaged
    assert second == sound
    store.remove("m")
    assert store.models() == [sound]


def test_damage_to_the_weights_is_found(store: Store) -> None:
    made = add(store, "m")
    path = store.blob_path(made.files[0].digest)
    path.chmod(0o644)
    path.write_bytes(b"flipped")
    assert store.verify("m") == ["model.gguf"]


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_skopeo_reads_the_layout(store: Store) -> None:
    made = add(store, "org/name:q4")
    done = subprocess.run(
        ["skopeo", "inspect", "--raw", f"oci:{store.root}:org/name:q4"], capture_output=True, timeout=30, check=True
    )
    assert "sha256:" + hashlib.sha256(done.stdout).hexdigest() == made.digest
    manifest = json.loads(done.stdout)
    assert manifest["config"]["mediaType"] == "application/vnd.docker.ai.model.config.v0.1+json"
    assert manifest["layers"][0]["mediaType"] == GGUF
    assert manifest["layers"][0]["annotations"]["org.cncf.model.filepath"] == "model.gguf"


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_skopeo_copies_every_byte_of_a_model(store: Store, tmp_path: Path) -> None:
    made = add(store, "m")
    target = f"oci:{tmp_path / 'copy'}:m"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{store.root}:m", target], timeout=30, check=True)
    copied = tmp_path / "copy" / "blobs" / "sha256" / made.files[0].digest.removeprefix("sha256:")
    assert copied.read_bytes() == b"weights" * 1000


TAGGER = """
import sys
from pathlib import Path
from pierhead.store.layout import Store

store = Store.open(Path(sys.argv[1]))
sys.stdin.readline()
for i in range(15):
    store.tag("base", f"name-{sys.argv[2]}-{i}")
"""


def test_processes_that_name_models_at_once_lose_no_entry(store: Store) -> None:
    add(store, "base")
    command = [sys.executable, "-c", TAGGER, str(store.root)]
    workers = [subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE) for n in range(4)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"go\n")
        worker.stdin.close()
    assert [worker.wait(60) for worker in workers] == [0, 0, 0, 0]
    assert len(store.get("base").names) == 61


CHILD = """
import os, signal, sys
from pathlib import Path
from pierhead.store.layout import Store
from pierhead.store.model import Layer

def die(step, wanted=sys.argv[2]):
    if step == wanted:
        os.kill(os.getpid(), signal.SIGKILL)

store = Store.open(Path(sys.argv[1]), die)
with store.lease():
    with store.ingest("k", size=7 << 20) as ingest:
        for _ in range(7):
            ingest.write(b"x" * (1 << 20))
            die("ingest:write")
        blob = ingest.commit()
    record = store.commit_model("new", layers=[Layer(blob.digest, blob.size, "m", "f.gguf")], metadata={})
store.materialize(record)
store.remove("new")
"""
STEPS = ["ingest:write", "blob:synced", "blob:renamed", "model:config", "model:manifest", "model:index"]
STEPS += ["materialize:filled", "remove:index", "collect:removed"]


@pytest.mark.parametrize("step", STEPS)
def test_a_process_killed_at_any_step_leaves_a_readable_store_and_no_lost_bytes(store: Store, step: str) -> None:
    kept = add(store, "kept")
    done = subprocess.run([sys.executable, "-c", CHILD, str(store.root), step], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    again = Store.open(store.root)
    assert kept.name in [m.name for m in again.models()]
    for record in again.models():
        assert again.verify(record.name) == []
    if any(m.name == "new" for m in again.models()):
        again.remove("new")
    again.collect()
    again.discard_partials()
    assert again.verify("kept") == []
    names = {p.name for p in again.blobs.folder.iterdir()}
    assert len(names) == 3  # weights, config and manifest of the model that was kept
    assert not [p for p in (store.root / "models").iterdir() if p.name not in {kept.digest[7:]}]
    assert again.usage().total < 200_000


def test_a_store_without_permission_says_so(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file is in the way")
    with pytest.raises(PierError):
        Store.open(tmp_path / "store")


def test_a_lock_file_that_is_cleaned_away_while_somebody_waits_for_it_still_locks(tmp_path: Path) -> None:
    lock, waits, order = tmp_path / "x.lock", threading.Event(), list[str]()

    def wait() -> None:
        with locked(lock, waiting=waits.set):
            order.append("waiter has it")
            with seized(lock) as free:
                order.append("free" if free else "taken")

    with locked(lock):
        other = threading.Thread(target=wait)
        other.start()
        assert waits.wait(10)
        lock.unlink()  # what a collector does to a dead transfer's
    other.join(10)
    assert order == ["waiter has it", "taken"]


def test_a_collector_leaves_a_lease_alone_that_is_taken_while_it_looks(store: Store) -> None:
    with store.lease():
        data = b"found meanwhile" * 100
        with store.ingest("k") as ingest:
            ingest.write(data)
            blob = ingest.commit()
        for _ in range(3):
            store.prune(partials=True)
            assert len(list((store.root / "leases").iterdir())) == 1
        assert store.has(blob.digest)
    assert not list((store.root / "leases").iterdir())
