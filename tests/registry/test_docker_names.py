"""What users of Docker Model Runner type brings Docker's artifacts, of every shape, from a real registry."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.package import golden
from tests.package.conftest import write_model
from tests.package.golden import DOCKER, Artifact

from pierhead.config import SourceSettings
from pierhead.paths import Paths
from pierhead.registry.client import Registry
from pierhead.registry.credentials import Login
from pierhead.registry.name import ImageName
from pierhead.registry.push import push_blob
from pierhead.sources.pull import inspect_remote, pull
from pierhead.store.layout import Store

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif("PIERHEAD_TEST_IMAGE" not in os.environ, reason="no test registry here (scripts/test-host)"),
]


def adapted(folder: Path) -> Artifact:
    """v0.1 with the spec's adapter layer beside the weights."""
    made = golden.docker("v0.1", "gguf", context_size=1024)
    made.add(f"{DOCKER}gguf.v3", write_model(folder / "m.gguf").read_bytes(), "m.gguf")
    made.add(f"{DOCKER}gguf.v3.lora", write_model(folder / "l.gguf", kind="adapter").read_bytes(), "l.gguf")
    return made


async def push(artifact: Artifact, repository: str, folder: Path) -> str:
    """To the test registry; its ``host:port``."""
    host = os.environ["PIERHEAD_TEST_IMAGE"].partition("/")[0]
    body = artifact.manifest()
    async with Registry(ImageName(host, repository, "v1"), SourceSettings(), Login()) as registry:
        for number, (key, data) in enumerate(artifact.blobs.items()):
            path = folder / f"blob-{number}"
            path.write_bytes(data)
            await push_blob(registry, key, path, len(data), lambda done: None)
        await registry.put_manifest("v1", "application/vnd.oci.image.manifest.v1+json", body)
    return host


@pytest.mark.parametrize(
    ("make", "roles"),
    [
        (golden.docker_gguf, {"weights", "license", "template", "mmproj"}),
        (golden.docker_split, {"weights"}),
        (adapted, {"weights", "lora"}),
        (golden.docker_safetensors, {"weights", "config", "other"}),
        (golden.docker_folder, {"weights", "other"}),
        (golden.docker_dduf, {"weights"}),
    ],
)
async def test_a_name_of_dockers_brings_its_artifact_to_the_byte(
    home: Paths, tmp_path: Path, make: Callable[[Path], Artifact], roles: set[str]
) -> None:
    artifact, name = make(tmp_path), f"ai/{uuid.uuid4().hex[:12]}"
    settings = SourceSettings(mirrors={"docker.io": (await push(artifact, name, tmp_path),)})
    store = Store.open(home.store)
    record = await pull(f"{name}:v1", store=store, settings=settings, paths=home, env={})
    assert record.name == f"{name}:v1"
    assert record.digest == golden.digest(artifact.manifest())
    assert record.source.startswith(f"oci://docker.io/{name}:v1@sha256:")
    assert roles <= {f.role for f in (*record.files, *record.unpacked)}
    assert store.verify(record.name) == []
    assert store.materialize(record).is_dir()
    again = await pull(f"docker.io/{name}:v1", store=store, settings=settings, paths=home, env={})
    assert (again.name, again.digest) == (record.name, record.digest)
    seen = await inspect_remote(f"{name}:v1", settings=settings, paths=home, env={})
    assert seen["metadata"]["format"] == record.metadata["format"]
