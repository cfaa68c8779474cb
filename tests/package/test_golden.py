"""Artifacts of Docker and CNCF ModelPack, as other tools write them, are pulled, laid out and packaged anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pierhead.config import SourceSettings
from pierhead.errors import PierError
from pierhead.package.build import package
from pierhead.package.recipe import Recipe
from pierhead.paths import Paths
from pierhead.sources.pull import inspect_remote, pull
from pierhead.store.layout import Store

from . import golden
from .golden import CNCF, DOCKER, Artifact

pytestmark = pytest.mark.timeout(60)
Make = Callable[[Path], Artifact]
SETTINGS = SourceSettings()
PACKED = ["tar", "tar+gzip", "tar+zstd"]
FOLDER = {"model.safetensors", "config.json", "tokenizer.json"}
CASES: list[tuple[str, Make, set[str], str, str]] = [
    ("docker gguf", golden.docker_gguf, {"model.gguf", "LICENSE", "template.jinja", "mmproj.gguf"}, "gguf", "F32"),
    ("docker split", golden.docker_split, {f"model-0000{n}-of-00002.gguf" for n in (1, 2)}, "gguf", "F32"),
    (
        "docker safetensors",
        golden.docker_safetensors,
        FOLDER | {"encoder/config.json", "encoder/deep/x.txt"},
        "safetensors",
        "BF16",
    ),
    (
        "docker folder",
        golden.docker_folder,
        {"model.safetensors", "config.json", "encoder/deep/x.txt"},
        "safetensors",
        "BF16",
    ),
    ("docker dduf", golden.docker_dduf, {"m.dduf"}, "dduf", "BF16"),
    (
        "cncf raw",
        golden.cncf_raw,
        {"model.safetensors", "config.json", "README.md", "modeling.py", "data/train.jsonl"},
        "safetensors",
        "BF16",
    ),
    ("cncf gguf", golden.cncf_gguf, {"tiny.gguf"}, "gguf", "F32"),
    *((f"cncf {p}", golden.cncf_packed(p), FOLDER | {"README.md"}, "safetensors", "BF16") for p in PACKED),
]


async def fetched(artifact: Artifact, home: Paths) -> tuple[Store, Any]:
    store = Store.open(home.store)
    async with golden.registry(artifact) as where:
        return store, await pull(where, store=store, settings=SETTINGS, paths=home, name="tiny", env={})


@pytest.mark.parametrize(("make", "files", "format", "type"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
async def test_an_artifact_is_pulled_as_it_is_and_laid_out(
    make: Make, files: set[str], format: str, type: str, home: Paths, tmp_path: Path
) -> None:
    artifact = make(tmp_path)

    store, record = await fetched(artifact, home)

    assert record.digest == golden.digest(artifact.manifest())
    assert (record.metadata["format"], record.metadata["quantization"]) == (format, type)
    folder = store.materialize(record)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == files
    assert {f.name for f in record.laid_out} == files
    assert store.verify("tiny") == []


@pytest.mark.parametrize("make", [c[1] for c in CASES], ids=[c[0] for c in CASES])
async def test_it_is_looked_at_without_being_pulled(make: Make, home: Paths, tmp_path: Path) -> None:
    async with golden.registry(make(tmp_path)) as where:
        found = await inspect_remote(where, settings=SETTINGS, paths=home, env={})

    assert found["files"]
    assert found["metadata"]["format"]


@pytest.mark.parametrize("make", [c[1] for c in CASES], ids=[c[0] for c in CASES])
async def test_it_is_packaged_anew_without_its_weights_being_touched(make: Make, home: Paths, tmp_path: Path) -> None:
    store, record = await fetched(make(tmp_path), home)

    again = package(store, Recipe(name="again", base=record, created="2026-01-01T00:00:00Z"))

    assert [f.digest for f in again.files] == [f.digest for f in record.files]
    assert [(f.name, f.role) for f in again.laid_out] == [(f.name, f.role) for f in record.laid_out]
    assert again.metadata == record.metadata
    first, second = (
        json.loads(store.blob_path(json.loads(store.blob_path(r.digest).read_bytes())["config"]["digest"]).read_bytes())
        for r in (record, again)
    )
    key = "modelfs" if "modelfs" in first else "rootfs"
    assert second[key] == first[key]


async def test_docker_s_context_size_counts_where_it_is_not_the_trained_one(home: Paths, tmp_path: Path) -> None:
    assert (await fetched(golden.docker_gguf(tmp_path), home))[1].packaged.context == 512
    assert (await fetched(golden.docker_split(tmp_path), home))[1].packaged.context == 0


async def test_the_template_of_an_artifact_counts_before_that_of_its_weights(home: Paths, tmp_path: Path) -> None:
    record = (await fetched(golden.docker_gguf(tmp_path), home))[1]

    assert record.metadata["chat_template"] == golden.TEMPLATE.decode()


@pytest.mark.parametrize(
    ("kind", "path", "data", "reason"),
    [
        (f"{DOCKER}safetensors", "m.safetensors", b"<html>please log in</html>", "web page"),
        (f"{DOCKER}safetensors", "m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (f"{DOCKER}safetensors", "m.safetensors", golden.WEIGHTS[:-1], "end at byte"),
        (f"{DOCKER}dduf", "m.dduf", b"x" * 600, "ZIP"),
        (f"{CNCF}weight.v1.tar", "", b"x" * 600, "does not start like one"),
        (f"{CNCF}weight.v1.tar+gzip", "", b"x" * 600, "starts with"),
        (f"{CNCF}weight.v1.tar+zstd", "", b"x" * 600, "starts with"),
        (f"{CNCF}weight.v1.raw", "m.onnx", b"x" * 600, "ONNX"),
        (f"{CNCF}weight.v1.raw", "../m.gguf", b"x", "leaves its folder"),
        (f"{CNCF}weight.v1.tar", "", golden.tar([("../m.safetensors", golden.WEIGHTS)]), "leaves the folder"),
        (f"{CNCF}weight.v1.tar", "", golden.tar([("m.safetensors", b"no weights")]), "safetensors"),
    ],
)
async def test_what_is_no_model_is_refused_and_gets_no_name(
    kind: str, path: str, data: bytes, reason: str, home: Paths
) -> None:
    artifact = golden.cncf("safetensors") if kind.startswith(CNCF) else golden.docker("v0.2", "safetensors")
    artifact.add(kind, data, path)

    with pytest.raises(PierError, match=reason):
        await fetched(artifact, home)
    assert Store.open(home.store).models() == []
