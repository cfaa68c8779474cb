"""Models travel in archives: what goes out comes back to the byte, other tools read and write it, lies are refused."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.sources.archive import import_models
from pierhead.store import tar as strict
from pierhead.store.export import bundle, save, write
from pierhead.store.layout import Store
from pierhead.store.media import CONFIG, GGUF, MANIFEST
from pierhead.store.model import Layer, ModelRecord

from .servers import make_gguf

pytestmark = pytest.mark.timeout(60)
WEIGHTS = make_gguf(20_000)


def quiet(*_: object) -> None:
    """A listener that wants nothing."""


def add(store: Store, name: str, data: bytes = WEIGHTS) -> ModelRecord:
    with store.lease(), store.ingest(f"key {name}") as ingest:
        ingest.write(data)
        blob = ingest.commit()
        layers = [Layer(blob.digest, blob.size, GGUF, "m.gguf")]
        return store.commit_model(name, layers=layers, metadata=_SUMMARY, annotations={"ai.pierhead.source": "hf:o/r"})


_SUMMARY = {"format": "gguf", "architecture": "llama"}


def said(store: Store, record: ModelRecord, text: str) -> str:
    """A statement about a model."""
    data = text.encode()
    parts = {
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": _digest(b"{}"), "size": 2},
        "layers": [{"mediaType": "text/plain", "digest": _digest(data), "size": len(data)}],
        "subject": {
            "mediaType": MANIFEST,
            "digest": record.digest,
            "size": store.blob_path(record.digest).stat().st_size,
        },
    }
    body = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/x.said", **parts})
    return store.attach(record.digest, body.encode(), [b"{}", data]).digest


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture
def first(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "first")


@pytest.fixture
def second(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "second")


def bring(store: Store, archive: Path | bytes, name: str = "") -> list[ModelRecord]:
    with io.BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb") as file:
        return import_models(store, file, name=name, report=quiet)


def empty(store: Store) -> bool:
    """Whether nothing at all is kept."""
    ingests = [p for p in store.blobs.ingests.iterdir() if p.suffix != ".lock"]
    return not list(store.blobs.folder.iterdir()) and not ingests and not store.models()


def test_several_models_and_what_is_said_about_them_come_back_the_same(
    first: Store, second: Store, tmp_path: Path
) -> None:
    one, two = add(first, "one"), add(first, "team/two:v1", make_gguf(9000, 2))
    statement = said(first, one, "it is good")
    plan = save(first, ["one", "team/two:v1"], tmp_path / "a.tar", quiet)
    assert plan.total > one.size + two.size
    back = bring(second, tmp_path / "a.tar")
    assert [(r.name, r.digest, r.source) for r in back] == [
        ("one", one.digest, "hf:o/r"), ("team/two:v1", two.digest, "hf:o/r"),
    ]  # fmt: skip
    assert second.verify("one") + second.verify("team/two:v1") == []
    assert [r.digest for r in second.referrers(one.digest)] == [statement]
    assert second.history("one")[0].by == "import"
    second.collect()
    save(second, ["one", "team/two:v1"], tmp_path / "b.tar", quiet)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes(), "the same models, the same bytes"
    assert [r.digest for r in bring(second, tmp_path / "a.tar")] == [one.digest, two.digest]
    assert second.versions("one") == []


def test_an_earlier_version_is_exported_under_the_name_that_it_is_of(
    first: Store, second: Store, tmp_path: Path
) -> None:
    old = add(first, "m")
    add(first, "m", make_gguf(9000, 2))
    save(first, [f"m@{old.digest}"], tmp_path / "a.tar", quiet)
    (record,) = bring(second, tmp_path / "a.tar")
    assert (record.name, record.digest) == ("m", old.digest)


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_skopeo_reads_what_we_write_and_we_read_what_skopeo_writes(first: Store, second: Store, tmp_path: Path) -> None:
    one, two = add(first, "one"), add(first, "two", make_gguf(9000, 2))
    said(first, one, "it is good")
    save(first, ["one", "two"], tmp_path / "a.tar", quiet)
    for name, record in (("one", one), ("two", two)):
        source = f"oci-archive:{tmp_path / 'a.tar'}:{name}"
        shown = subprocess.run(["skopeo", "inspect", "--raw", source], capture_output=True, timeout=30, check=True)
        assert _digest(shown.stdout) == record.digest
        copied = f"oci-archive:{tmp_path / name}.tar:again/{name}:v2"
        subprocess.run(["skopeo", "copy", "-q", source, copied], timeout=30, check=True)
        (back,) = bring(second, tmp_path / f"{name}.tar")
        assert (back.name, back.digest) == (f"again/{name}:v2", record.digest)
    nameless = f"oci-archive:{tmp_path / 'nameless.tar'}"
    subprocess.run(["skopeo", "copy", "-q", f"oci-archive:{tmp_path / 'a.tar'}:one", nameless], timeout=30, check=True)
    with pytest.raises(UsageError) as caught:
        bring(second, tmp_path / "nameless.tar")
    assert "--name" in (caught.value.hint or "")
    assert bring(second, tmp_path / "nameless.tar", "mine")[0].digest == one.digest


@pytest.mark.parametrize("program", ["podman", "buildah"])
def test_podman_and_buildah_read_the_manifest_in_an_archive(first: Store, tmp_path: Path, program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    add(first, "one")
    save(first, ["one"], tmp_path / "a.tar", quiet)
    with tempfile.TemporaryDirectory(prefix="pd") as short:  # Podman wants a path of 50 characters at most
        storage = ("--root", f"{short}/root", "--runroot", f"{short}/run", "--storage-driver", "vfs")
        argv = [program, *storage, "pull", f"oci-archive:{tmp_path / 'a.tar'}:one"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=50, check=False)
    assert CONFIG in done.stderr, done.stderr


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_compressed_archives_are_read_from_a_pipe(
    first: Store, second: Store, tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    one = add(first, "one")
    save(first, ["one"], tmp_path / "a.tar", quiet)
    read, wrote = os.pipe()

    def feed() -> None:
        with open(wrote, "wb") as pipe:
            pipe.write(pack((tmp_path / "a.tar").read_bytes()))

    feeder = threading.Thread(target=feed)
    feeder.start()
    with open(read, "rb", buffering=0) as pipe:
        (record,) = import_models(second, pipe, report=quiet)
    feeder.join(10)
    assert record.digest == one.digest


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_an_archive_that_grows_without_measure_is_stopped(
    second: Store, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(strict, "FREE", 1 << 20)
    zeros = bytes(32 << 20)
    bomb = pack(tared([(f"blobs/sha256/{_digest(zeros)[7:]}", zeros)]))
    with pytest.raises(CorruptData, match="beyond all measure"):
        bring(second, bomb)
    assert empty(second)


def tared(members: list[tuple[str, bytes]]) -> bytes:
    """A tar of these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def members(first: Store, tmp_path: Path) -> list[tuple[str, bytes]]:
    """The members of an honest archive."""
    said(first, add(first, "one"), "it is good")
    save(first, ["one"], tmp_path / "honest.tar", quiet)
    with tarfile.open(tmp_path / "honest.tar") as archive:
        files = [m for m in archive if m.isfile()]
        return [(m.name, archive.extractfile(m).read()) for m in files]  # type: ignore[union-attr]


Members = list[tuple[str, bytes]]


def edited(members: Members, name: str, change: Callable[[bytes], bytes]) -> Members:
    return [(n, change(d) if n == name else d) for n, d in members]


def entries(change: Callable[[list[dict[str, object]]], object]) -> Callable[[Members], Members]:
    """A lie in the index."""

    def lie(members: Members) -> Members:
        def rewrite(data: bytes) -> bytes:
            document = json.loads(data)
            change(document["manifests"])
            return json.dumps(document).encode()

        return edited(members, "index.json", rewrite)

    return lie


def swapped(members: Members) -> Members:
    """The weights have other bytes of the same length."""
    return [(n, bytes(len(d)) if len(d) > 10_000 else d) for n, d in members]


def without_what_is_said(members: Members) -> Members:
    """The statement about the model lacks its text."""
    return [(n, d) for n, d in members if d != b"it is good"]


LIES: dict[str, Callable[[Members], Members]] = {
    "a statement without its text": without_what_is_said,
    "name is of a version": entries(
        lambda e: e[0].update(annotations={"org.opencontainers.image.ref.name": "kept@sha256:" + "0" * 64})
    ),
    "name is of a version, in short": entries(
        lambda e: e[0].update(annotations={"org.opencontainers.image.ref.name": "kept@sha256:" + "0" * 8})
    ),
    "other bytes": swapped,
    "cut bytes": lambda m: [(n, d[:-1] if len(d) > 10_000 else d) for n, d in m],
    "no weights": lambda m: [(n, d) for n, d in m if len(d) < 10_000],
    "a blob twice": lambda m: [*m, m[-1]],
    "index twice": lambda m: [m[1], *m],
    "index too large": lambda m: edited(m, "index.json", lambda d: d + b" " * (5 << 20)),
    "index broken": lambda m: edited(m, "index.json", lambda d: d[:-5]),
    "index not ours": lambda m: edited(m, "index.json", lambda _: b"[]"),
    "no index": lambda m: [x for x in m if x[0] != "index.json"],
    "no layout": lambda m: [x for x in m if x[0] != "oci-layout"],
    "digest no digest": entries(lambda e: e[0].update(digest="sha256:../../etc/passwd")),
    "digest elsewhere": entries(lambda e: e[0].update(digest="sha512:" + "0" * 128)),
    "entry of nothing": entries(lambda e: e[0].update(digest="sha256:" + "0" * 64)),
    "entry is weights": lambda m: entries(
        lambda e: e[0].update(digest="sha256:" + next(n for n, d in m if len(d) > 10_000)[-64:])
    )(m),
    "too many entries": entries(lambda e: e.extend([e[0]] * 5000)),
    "one name twice": entries(lambda e: e.append({**e[1], "annotations": e[0]["annotations"]})),
    "name leaves": entries(lambda e: e[0].update(annotations={"org.opencontainers.image.ref.name": "../x"})),
    "name is a digest": entries(
        lambda e: e[0].update(annotations={"org.opencontainers.image.ref.name": "sha256:" + "0" * 64})
    ),
    "no entries": entries(lambda e: e.clear()),
    "path leaves": lambda m: [*m, ("../evil", b"x")],
    "path absolute": lambda m: [*m, ("/etc/evil", b"x")],
    "path in blobs leaves": lambda m: [*m, ("blobs/sha256/../../index.json", b"{}")],
    "blob of another kind": lambda m: [*m, ("blobs/sha512/" + "0" * 128, b"x")],
    "blob with a wrong name": lambda m: [*m, ("blobs/sha256/x", b"x")],
}


@pytest.mark.parametrize("lie", LIES)
def test_an_archive_that_lies_is_refused_and_nothing_of_it_stays(second: Store, members: Members, lie: str) -> None:
    with pytest.raises((CorruptData, UsageError)) as caught:
        bring(second, tared(LIES[lie](members)))
    assert caught.value.message
    assert empty(second), lie
    kept = add(second, "kept", make_gguf(5000, 3))
    with pytest.raises((CorruptData, UsageError)):
        bring(second, tared(LIES[lie](members)))
    assert second.verify("kept") == []
    assert len(list(second.blobs.folder.iterdir())) == 3
    assert kept.digest == second.get("kept").digest


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_devices_and_sparse_files_are_refused(second: Store, kind: bytes) -> None:
    member = tarfile.TarInfo("blobs/sha256/" + "0" * 64)
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(CorruptData, match="cannot be imported"):
        bring(second, member.tobuf() + bytes(1024))
    assert empty(second)


def test_a_cut_or_flipped_archive_gives_whole_models_or_none(second: Store, members: Members) -> None:
    whole = tared(members)
    places = range(0, len(whole) - 10_240, 997)
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 0x55
        for data in (whole[:place], bytes(flipped)):
            with contextlib.suppress(CorruptData, UsageError):
                bring(second, data)
            for record in second.models():  # padding: nothing that matters was hit
                assert second.verify(record.name) == []
                second.remove(record.name)
    assert empty(second)


def test_a_damaged_blob_is_not_exported_and_leaves_no_file(first: Store, tmp_path: Path) -> None:
    made = add(first, "one")
    blob = first.blob_path(made.files[0].digest)
    blob.chmod(0o644)
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(CorruptData) as caught:
        save(first, ["one"], tmp_path / "a.tar", quiet)
    assert "pier" in (caught.value.hint or "")
    assert [p.name for p in tmp_path.iterdir()] == ["first"]


def test_a_model_that_is_removed_while_it_is_exported_goes_out_whole(first: Store, second: Store) -> None:
    made = add(first, "one")
    out = io.BytesIO()
    with first.hold("one") as records:
        plan = bundle(first, records)
        first.remove("one")
        write(first, plan, out.write, quiet)
    assert bring(second, out.getvalue())[0].digest == made.digest
    first.collect()
    assert empty(first)


def test_what_is_not_there_cannot_be_exported(first: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        save(first, ["ghost"], tmp_path / "a.tar", quiet)
    assert not list(tmp_path.glob("*.tar"))


def test_two_versions_of_one_name_do_not_fit_into_one_archive(first: Store, tmp_path: Path) -> None:
    old = add(first, "m")
    add(first, "m", make_gguf(9000, 2))
    with pytest.raises(UsageError, match="one name"):
        save(first, ["m", f"m@{old.digest}"], tmp_path / "a.tar", quiet)
    assert not list(tmp_path.glob("*.tar"))
