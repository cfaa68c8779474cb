"""Models in Ollama's own folder are taken over from there: nothing is downloaded, followed or changed."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from pierhead import events
from pierhead.errors import CorruptData, NotFound
from pierhead.refs import parse
from pierhead.sources.ollama import Ollama
from pierhead.sources.ollama_model import ollama_name
from pierhead.sources.ollama_store import OllamaStore, ollama_folders

from .golden_ollama import OllamaModel, OllamaRegistry, digest, ollama_registry
from .servers import Puller, make_gguf

pytestmark = pytest.mark.timeout(60)
WEIGHTS = make_gguf(seed=21)
MODEL = OllamaModel([("model", WEIGHTS), ("license", b"Apache License"), ("params", b'{"num_ctx":2048}')])
BLOB = "blobs/" + digest(WEIGHTS).replace(":", "-")


@pytest.fixture
async def registry() -> AsyncGenerator[OllamaRegistry]:
    async with ollama_registry() as found:
        found.models["library/tiny:latest"] = MODEL
        yield found


@pytest.fixture
def folder(puller: Puller) -> Path:
    """Where Ollama keeps models for the user of the tests."""
    return Path(puller.env["HOME"]) / ".ollama" / "models"


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What would change if anybody wrote there."""
    found = {str(p): p.lstat() for p in sorted(folder.rglob("*"))}
    return {name: (s.st_mtime_ns, s.st_size, s.st_mode) for name, s in found.items()}


async def test_a_model_that_ollama_has_is_taken_without_a_download(puller: Puller, folder: Path) -> None:
    MODEL.write(folder)
    before = state(folder)
    record = await puller("ollama://tiny")
    assert record.name == "tiny"
    assert {f.name for f in record.files} == {"model.gguf", "LICENSE"}
    assert record.files[0].digest == digest(WEIGHTS)
    assert puller.store.verify("tiny") == []
    assert state(folder) == before
    assert any("nothing is downloaded" in e.message for e in puller.events if isinstance(e, events.Note))


@pytest.mark.parametrize(
    ("reference", "place", "name"),
    [
        ("ollama://tiny:1m", "registry.ollama.ai/library/tiny/1m", "tiny:1m"),
        ("ollama://me/Own.1", "registry.ollama.ai/me/Own.1/latest", "me/Own.1"),
        ("ollama://host.example/me/own:x", "host.example/me/own/x", "host.example/me/own:x"),
        ("registry.ollama.ai/library/tiny", "registry.ollama.ai/library/tiny/latest", "tiny"),
    ],
)
async def test_every_form_of_name_finds_its_manifest(
    puller: Puller, folder: Path, reference: str, place: str, name: str
) -> None:
    MODEL.write(folder, place)
    assert (await puller(reference)).name == name


async def test_a_linked_model_shares_the_file_and_survives_ollamas_touching_it(puller: Puller, folder: Path) -> None:
    MODEL.write(folder)
    record = await puller("ollama://tiny", link=True)
    blob = folder / BLOB
    assert puller.store.blob_path(digest(WEIGHTS)).stat().st_ino == blob.stat().st_ino
    os.utime(blob, ns=(time.time_ns(), time.time_ns()))
    puller.store.recheck(record)
    puller.store.recheck(record)
    blob.write_bytes(WEIGHTS[:-1] + b"!")
    with pytest.raises(CorruptData, match="was changed after it was linked"):
        puller.store.recheck(record)


async def test_a_copy_that_is_not_whole_is_fetched_instead(
    puller: Puller, folder: Path, registry: OllamaRegistry
) -> None:
    MODEL.write(folder, f"{registry.base}/library/tiny/latest")
    (folder / BLOB).rename(folder / f"{BLOB}-partial")
    record = await puller(f"ollama://{registry.base}/library/tiny")
    assert record.files[0].digest == digest(WEIGHTS)
    assert registry.stored
    assert any("still being downloaded" in e.message for e in puller.events if isinstance(e, events.Note))


# --- traps ------------------------------------------------------------------------------------------------------------


def _link_to_a_secret(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes(WEIGHTS)
    (folder / BLOB).unlink()
    (folder / BLOB).symlink_to(secret)


def _linked_folder(folder: Path) -> None:
    (folder / "blobs").rename(folder.parent / "elsewhere")
    (folder / "blobs").symlink_to(folder.parent / "elsewhere")


def _linked_manifest(folder: Path) -> None:
    path = folder / "manifests/registry.ollama.ai/library/tiny/latest"
    path.rename(folder.parent / "manifest")
    path.symlink_to(folder.parent / "manifest")


def _pipe(folder: Path) -> None:
    (folder / BLOB).unlink()
    os.mkfifo(folder / BLOB)


def _pipe_for_a_manifest(folder: Path) -> None:
    path = folder / "manifests/registry.ollama.ai/library/tiny/latest"
    path.unlink()
    os.mkfifo(path)


def _folder_for_a_blob(folder: Path) -> None:
    (folder / BLOB).unlink()
    (folder / BLOB).mkdir()


def _endless_manifest(folder: Path) -> None:
    path = folder / "manifests/registry.ollama.ai/library/tiny/latest"
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    "spoil",
    [
        _link_to_a_secret,
        _linked_folder,
        _linked_manifest,
        _pipe,
        _pipe_for_a_manifest,
        _folder_for_a_blob,
        _endless_manifest,
    ],
)
async def test_traps_in_the_folder_are_neither_followed_nor_waited_for(
    puller: Puller, folder: Path, spoil: Callable[[Path], None]
) -> None:
    MODEL.write(folder)
    spoil(folder)
    here = Ollama(None, puller.env, puller.listen, OllamaStore(folder))
    with pytest.raises(CorruptData):
        await here.plan(parse("ollama://tiny"))


async def test_a_blob_that_does_not_match_its_name_is_refused_and_not_kept(puller: Puller, folder: Path) -> None:
    MODEL.write(folder)
    (folder / BLOB).write_bytes(WEIGHTS[:-1] + b"!")
    for link in (False, True):
        with pytest.raises(CorruptData, match=r"has digest sha256:.*, expected"):
            await puller("ollama://tiny", link=link)
    assert puller.store.models() == []
    assert not (puller.store.blobs.folder / digest(WEIGHTS)[7:]).exists()


async def test_a_blob_that_becomes_a_link_after_the_look_is_not_followed(puller: Puller, folder: Path) -> None:
    MODEL.write(folder)

    def listen(event: events.AnyEvent) -> None:
        if isinstance(event, events.PullPlanned):
            _link_to_a_secret(folder)

    puller.listen = listen  # type: ignore[method-assign]
    with pytest.raises(CorruptData, match="link"):
        await puller("ollama://tiny")
    assert puller.store.models() == []


def test_the_folder_is_where_ollama_says(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    MODEL.write(mine)
    link = tmp_path / "link"
    link.symlink_to(mine)
    assert ollama_folders({"OLLAMA_MODELS": f'"{link}"', "HOME": str(tmp_path)}) == (mine,)
    assert mine not in ollama_folders({"HOME": str(tmp_path)})


def test_the_list_holds_names_only(tmp_path: Path) -> None:
    MODEL.write(tmp_path)
    MODEL.write(tmp_path, "registry.ollama.ai/me/own/v1")
    manifests = tmp_path / "manifests"
    (manifests / "registry.ollama.ai/library/tiny/.hidden").write_text("x")
    (manifests / "registry.ollama.ai/library/link").symlink_to(manifests / "registry.ollama.ai/me/own")
    (manifests / "registry.ollama.ai/stray").write_text("x")
    assert [name.short for name in OllamaStore(tmp_path).names()] == ["me/own:v1", "tiny:latest"]
    with pytest.raises(NotFound, match="has no model 'none:latest'"):
        OllamaStore(tmp_path).manifest(ollama_name(parse("ollama://none")))
