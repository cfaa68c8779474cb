"""A model's folder: archives are unpacked into it, and whatever an archive or annotation tries, nothing leaves it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pierhead.errors import CorruptData, OutOfSpace, PierError
from pierhead.store import tar as reader
from pierhead.store.layout import Store
from pierhead.store.model import ModelFile

from .tars import header, pack, raw_header, tar

pytestmark = pytest.mark.timeout(60)
PACKINGS = ["tar", "tar+gzip", "tar+zstd"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def lay_out(store: Store, *layers: tuple[str, bytes, str]) -> Path:
    """The folder of a model of these layers: (name, bytes, packing)."""
    files = [
        ModelFile(name, len(data), "other", store.blobs.put(data).digest, packing=packing)
        for name, data, packing in layers
    ]
    key = hashlib.sha256(repr(files).encode()).hexdigest()
    return store.lay_out(f"sha256:{key}", files)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_are_unpacked_beside_plain_files(store: Store, packing: str, format: int) -> None:
    long = "deep/" * 15 + "b.json"
    data = tar([("a.txt", b"A"), (long, b"B" * 2000), header("empty", b"5")], format=format)

    folder = lay_out(store, ("weights.gguf", b"W", "raw"), ("x", pack(data, packing), packing))

    assert tree(folder) == {"weights.gguf": b"W", "a.txt": b"A", long: b"B" * 2000}
    assert (folder / "empty").is_dir()
    assert {p.stat().st_mode & 0o222 for p in folder.rglob("*") if p.is_file()} == {0}


def test_plain_files_share_their_blobs(store: Store) -> None:
    folder = lay_out(store, ("w", b"W", "raw"))

    blob = store.blobs.put(b"W")
    assert (folder / "w").stat().st_ino == store.blob_path(blob.digest).stat().st_ino


def test_a_name_beyond_a_hundred_bytes_is_read_in_every_dialect(store: Store) -> None:
    name = "d/" + "n" * 200
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        assert tree(lay_out(store, ("x", tar([(name, b"1")], format=format), "tar"))) == {name: b"1"}


ESCAPES = [
    "../out",
    "a/../../out",
    "/etc/passwd",
    "a/../../../etc/passwd",
    "..",
    "a\\..\\b",
    "a\nb",
    "x" * 300,
    "d/" * 600 + "f",
    "a//b",
]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ESCAPES)
def test_a_member_whose_path_leaves_the_folder_is_refused(store: Store, name: str, packing: str) -> None:
    data = pack(tar([("fine", b"1"), (name, b"2")]), packing)

    with pytest.raises(CorruptData):
        lay_out(store, ("x", data, packing))
    assert not list((store.root / "models").iterdir())
    assert not (store.root / "out").exists()


@pytest.mark.parametrize(
    "entry",
    [
        header("l", tarfile.SYMTYPE, link="/etc/passwd"),
        header("l", tarfile.SYMTYPE, link="fine"),
        header("l", tarfile.LNKTYPE, link="fine"),
        header("l", tarfile.LNKTYPE, link="/etc/passwd"),
        header("d", tarfile.CHRTYPE),
        header("d", tarfile.BLKTYPE),
        header("f", tarfile.FIFOTYPE),
        header("s", tarfile.GNUTYPE_SPARSE),
        header("../c", tarfile.CONTTYPE),
        header("v", b"V"),
        header("g", b"0", pax_headers={"GNU.sparse.major": "1"}),
    ],
)
def test_links_devices_and_sparse_files_are_refused(store: Store, entry: tarfile.TarInfo) -> None:
    with pytest.raises(CorruptData):
        lay_out(store, ("x", tar([("fine", b"1"), entry]), "tar"))


@pytest.mark.parametrize(
    "layers",
    [
        [("a", b"1", "raw"), ("A", b"2", "raw")],
        [("a", b"1", "raw"), ("a", b"2", "raw")],
        [("a", b"1", "raw"), ("a/b", b"2", "raw")],
        [("a/b", b"1", "raw"), ("a", b"2", "raw")],
        [("d/x", b"1", "raw"), ("D/y", b"2", "raw")],
        [("x", tar([("a", b"1"), ("a", b"2")]), "tar")],
        [("x", tar([("a", b"1"), ("A", b"2")]), "tar")],
        [("x", tar([("ß", b"1"), ("SS", b"2")]), "tar")],
        [("a", b"1", "raw"), ("x", tar([("./a", b"2")]), "tar")],
        [("x", tar([("a", b"1")]), "tar"), ("y", tar([("a", b"2")]), "tar")],
        [("x", tar([("a", b"1"), header("a", b"5")]), "tar")],
    ],
)
def test_two_files_of_one_name_are_refused(store: Store, layers: Sequence[tuple[str, bytes, str]]) -> None:
    with pytest.raises(CorruptData, match="one name"):
        lay_out(store, *layers)


@pytest.mark.parametrize("name", ESCAPES)
def test_a_plain_file_whose_annotation_leaves_the_folder_is_refused(store: Store, name: str) -> None:
    from pierhead.store.index import Descriptor
    from pierhead.store.layers import files_of
    from pierhead.store.media import FILEPATH, GGUF

    if name == "a//b":
        return  # the same as a/b, and inside
    with pytest.raises(CorruptData):
        files_of([Descriptor(GGUF, "sha256:" + "0" * 64, 1, annotations={FILEPATH: name})], {})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (raw_header(b"big", b"77777777777"), "larger than its archive"),
        (raw_header(b"big", b"\x80" + b"\xff" * 11), "claims"),
        (raw_header(b"x", b"99"), "number"),
        (raw_header(b"x", b"1000")[:-1], "too early"),
        (raw_header(b"x", b"10"), "ends inside"),
        (b"x" * 512, "no tar archive"),
        (raw_header(b"x", b"0") + b"x" * 512, "damaged|number"),
        (raw_header(b"x", b"7777777", b"x"), "extended header claims"),
        (raw_header(b"x", b"7777777", b"L"), "extended header claims"),
        (raw_header(b"x", b"10", b"x") + b"99 path=a".ljust(512, b"\0"), "damaged"),
        (raw_header(b"x", b"20", b"x") + b"16 size=99999\nxx".ljust(512, b"\0"), "damaged"),
        (raw_header(b"x", b"14", b"g") + b"12 path=../\n".ljust(512, b"\0"), "no place"),
        (raw_header(b"\xff\xfe", b"0"), "UTF-8"),
        (raw_header(b"dir/", b"5"), "name of a folder"),
    ],
)
def test_headers_that_lie_are_refused(store: Store, data: bytes, reason: str) -> None:
    with pytest.raises(CorruptData, match=reason):
        lay_out(store, ("x", data, "tar"))


def test_more_members_than_any_model_has_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_MEMBERS", 100)
    with pytest.raises(CorruptData, match="more than 100 members"):
        lay_out(store, ("x", tar([(f"f{n}", b"") for n in range(101)]), "tar"))


@pytest.mark.parametrize("packing", ["tar+gzip", "tar+zstd"])
def test_an_archive_that_grows_beyond_all_measure_is_stopped(
    store: Store, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "FREE", 1 << 20)
    bomb = pack(tar([("zeros", bytes(32 << 20))]), packing)

    with pytest.raises(CorruptData, match="beyond all measure"):
        lay_out(store, ("x", bomb, packing))
    assert not list((store.root / "models").iterdir())


@pytest.mark.parametrize("packing", ["tar+gzip", "tar+zstd"])
def test_compressed_data_that_is_cut_or_damaged_is_refused(store: Store, packing: str) -> None:
    whole = pack(tar([("a", os.urandom(200_000))]), packing)

    for data in (whole[: len(whole) // 2], b"nothing of the kind", whole[:4] + b"\0" * 60 + whole[64:]):
        with pytest.raises(CorruptData):
            lay_out(store, ("x", data, packing))


def test_a_disk_that_is_too_small_is_told_before_it_is_full(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def small(path: object) -> os.statvfs_result:
        found = list(real(path))  # type: ignore[arg-type]
        found[4] = 1  # blocks that are free
        return os.statvfs_result(found)

    monkeypatch.setattr("pierhead.store.materialize.os.statvfs", small)
    with pytest.raises(OutOfSpace, match="unpacking"):
        lay_out(store, ("x", tar([("a", bytes(100_000))]), "tar"))


parts = st.sampled_from(["a", "b", "..", ".", "", "A", "c d", "é", "/", "x" * 200, "\\", "\n"])
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)
kinds = st.sampled_from([b"0", b"5", b"1", b"2", b"3", b"6", b"L", b"x", b"g", b"S", b"7"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(paths, kinds, st.binary(max_size=20)), max_size=4), st.sampled_from(PACKINGS))
def test_whatever_an_archive_holds_the_folder_is_all_that_changes(
    store: Store, entries: list[tuple[str, bytes, bytes]], packing: str
) -> None:
    blocks = b""
    for name, kind, data in entries:
        raw = name.encode()[:100]
        blocks += raw_header(raw, b"%o" % len(data), kind) + data + bytes(-len(data) % 512)
    before = {p for p in store.root.parent.rglob("*") if store.root / "models" not in p.parents and p.name != "ingest"}

    with contextlib.suppress(PierError):
        folder = lay_out(store, ("x", pack(blocks + bytes(1024), packing), packing))
        assert folder.parent == store.root / "models"
        assert not [p for p in folder.rglob("*") if p.is_symlink()]

    after = {p for p in store.root.parent.rglob("*") if store.root / "models" not in p.parents and p.name != "ingest"}
    outside = {p for p in after - before if p.parent not in (store.blobs.folder, store.root / "leases")}
    assert not outside


@given(st.binary(max_size=1500))
def test_any_bytes_end_in_members_or_a_clear_error(data: bytes) -> None:
    import io

    with contextlib.suppress(CorruptData):
        for _ in reader.Archive(io.BytesIO(data)):
            pass
