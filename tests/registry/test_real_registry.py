"""Models go to a real registry and come back the same, to the byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pierhead.config import SourceSettings
from pierhead.errors import NotFound
from pierhead.events import ignore
from pierhead.paths import Paths
from pierhead.refs import parse
from pierhead.registry.name import image_name
from pierhead.registry.publish import push_model
from pierhead.sources.pull import inspect_remote, pull
from pierhead.store.layout import Store

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif("PIERHEAD_TEST_IMAGE" not in os.environ, reason="no test registry here (scripts/test-host)"),
]
SETTINGS = SourceSettings()


def place() -> str:
    host = os.environ["PIERHEAD_TEST_IMAGE"].partition("/")[0]
    return f"{host}/models/{uuid.uuid4().hex[:12]}:v1"


async def send(store: Store, model: str, where: str) -> int:
    done = await push_model(store, model, image_name(parse(where)), settings=SETTINGS, env={}, listener=ignore)
    return done.sent


async def test_a_model_that_was_pushed_comes_back_the_same(home: Paths, tmp_path: Path, smollm2: Path) -> None:
    first, second = Store.open(home.store), Store.open(tmp_path / "other")
    mine = await pull(str(smollm2), store=first, settings=SETTINGS, paths=home, name="mine")
    where = place()
    assert await send(first, "mine", where) > mine.size
    assert await send(first, "mine", where) == 0
    back = await pull(where, store=second, settings=SETTINGS, paths=home, env={})
    assert (back.digest, back.name, back.metadata) == (mine.digest, where, mine.metadata)
    assert back.source == f"oci://{where}@{mine.digest}"
    assert second.verify(where) == []
    seen = await inspect_remote(where, settings=SETTINGS, paths=home, env={})
    assert seen["metadata"] == mine.metadata
    other = place()
    assert await send(second, where, other) == 0, "the registry can take the blobs from the other repository"


async def test_other_tools_read_what_was_pushed(home: Paths, tmp_path: Path, smollm2: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    store, where = Store.open(home.store), place()
    mine = await pull(str(smollm2), store=store, settings=SETTINGS, paths=home, name="mine")
    await send(store, "mine", where)
    copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{where}", f"oci:{tmp_path / 'copy'}:x"]
    subprocess.run(copy, check=True, timeout=60)  # noqa: ASYNC221
    index = json.loads((tmp_path / "copy" / "index.json").read_text())
    assert index["manifests"][0]["digest"] == mine.digest


async def test_what_another_tool_pushed_is_pulled_as_it_is(home: Paths, tmp_path: Path, smollm2: Path) -> None:
    """An artifact without any of our fields, with CNCF's types."""
    import hashlib

    from pierhead.registry.client import Registry
    from pierhead.registry.credentials import Login
    from pierhead.registry.push import push_blob

    where = place()
    config = tmp_path / "config"
    config.write_text('{"descriptor": {"name": "x"}, "config": {}, "modelfs": {"type": "layers", "diffIds": []}}')

    def part(kind: str, path: Path, name: str) -> dict[str, object]:
        digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        found = {"mediaType": f"application/vnd.cncf.model.{kind}", "digest": digest, "size": path.stat().st_size}
        return {**found, "annotations": {"org.cncf.model.filepath": name}} if name else found

    parts = [part("config.v1+json", config, ""), part("weight.v1.raw", smollm2, "a/weights.gguf")]
    body = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/vnd.cncf.model.manifest.v1+json",
            "config": parts[0],
            "layers": parts[1:],
        }
    ).encode()
    async with Registry(image_name(parse(where)), SETTINGS, Login()) as registry:
        for found, path in zip(parts, (config, smollm2), strict=True):
            await push_blob(registry, str(found["digest"]), path, int(str(found["size"])), lambda done: None)
        await registry.put_manifest("v1", "application/vnd.oci.image.manifest.v1+json", body)
    store = Store.open(home.store)
    got = await pull(where, store=store, settings=SETTINGS, paths=home, env={})
    assert got.digest == "sha256:" + hashlib.sha256(body).hexdigest()
    assert [f.name for f in got.files] == ["a/weights.gguf"]
    assert got.metadata["architecture"] == "llama"
    assert store.get(where).metadata == got.metadata
    store.remove(where)
    assert not list((home.store / "beside").iterdir())


async def test_a_tag_that_is_not_there_is_said(home: Paths) -> None:
    with pytest.raises(NotFound, match="404"):
        await pull(place(), store=Store.open(home.store), settings=SETTINGS, paths=home, env={})


def test_the_command_pushes_and_pulls(tmp_path: Path, smollm2: Path) -> None:
    env = {**os.environ, "PIERHEAD_HOME": str(tmp_path / "home"), "DOCKER_CONFIG": str(tmp_path)}
    where = place()

    def pier(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).parent / "pier"), *words]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)

    assert pier("pull", str(smollm2), "--name", "mine").returncode == 0
    pushed = pier("push", "mine", where)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith("sha256:")
    again = pier("push", "mine", where, "--json")
    assert json.loads(again.stdout.splitlines()[-1])["sent"] == 0
    pulled = pier("pull", where)
    assert pulled.stdout == pushed.stdout, pulled.stderr
    assert where in pier("list").stdout
    for words in (
        ("push", "mine", "nowhere"),
        ("push", "mine"),
        ("push", "other", where),
        ("push", "mine", f"{where}@"),
    ):
        refused = pier(*words)
        assert refused.returncode in (2, 3), words
        assert "Traceback" not in refused.stderr
