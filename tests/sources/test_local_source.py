"""Models that are files or folders on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pierhead.errors import BadReference, CorruptData, NotFound, PierError, UsageError

from .servers import Puller, digest, make_gguf

MODEL = make_gguf()


def shard(number: int, of: int = 2) -> bytes:
    return make_gguf(150_000, number, **{"split.no": number - 1, "split.count": of, "split.tensors.count": of})


async def test_a_file_is_taken_in_and_stays_where_it_was(puller: Puller, tmp_path: Path) -> None:
    path = tmp_path / "My Model-Q4_0.gguf"
    path.write_bytes(MODEL)
    record = await puller(str(path))
    assert record.name == "my-model-q4_0"
    assert puller.content(record) == MODEL == path.read_bytes()
    assert record.source == f"file:{path}"


async def test_a_file_can_be_linked(puller: Puller, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(MODEL)
    record = await puller(str(path), link=True)
    assert puller.store.blob_path(record.files[0].digest).stat().st_ino == path.stat().st_ino


async def test_a_folder_with_one_model_and_its_projector(puller: Puller, tmp_path: Path) -> None:
    folder = tmp_path / "see"
    folder.mkdir()
    (folder / "See-Q4_0.gguf").write_bytes(MODEL)
    (folder / "mmproj-f16.gguf").write_bytes(make_gguf(90_000, 3))
    (folder / "notes.txt").write_text("x")
    record = await puller(str(folder))
    assert {f.name: f.role for f in record.files} == {"See-Q4_0.gguf": "weights", "mmproj-f16.gguf": "mmproj"}
    assert record.name == "see"


async def test_one_shard_brings_the_others(puller: Puller, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"big-0000{number}-of-00002.gguf").write_bytes(shard(number))
    record = await puller(str(tmp_path / "big-00001-of-00002.gguf"))
    assert [f.digest for f in record.files] == [digest(shard(1)), digest(shard(2))]
    (tmp_path / "big-00002-of-00002.gguf").unlink()
    with pytest.raises(CorruptData, match="1 of the 2 parts"):
        await puller(str(tmp_path / "big-00001-of-00002.gguf"), name="again")


async def test_a_folder_with_several_models_names_them(puller: Puller, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(MODEL)
    with pytest.raises(UsageError, match=r"a\.gguf, b\.gguf"):
        await puller(str(folder))


@pytest.mark.parametrize(
    ("content", "error"),
    [(None, NotFound), (b"", CorruptData), (b"PK\x03\x04 not a model" * 9, CorruptData), (MODEL[:-999], CorruptData)],
)
async def test_what_is_no_model_is_refused_and_nothing_kept(
    puller: Puller, tmp_path: Path, content: bytes | None, error: type[PierError]
) -> None:
    path = tmp_path / "m.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error) as caught:
        await puller(str(path))
    assert str(path) in caught.value.message
    assert puller.store.models() == []
    assert puller.store.usage().blobs == 0


async def test_nonsense_is_not_a_reference(puller: Puller) -> None:
    with pytest.raises(BadReference):
        await puller("what is this?")
