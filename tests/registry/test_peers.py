"""Other tools of the field read what was pushed to a real registry: oras, Podman and Buildah."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest

from pierhead.config import SourceSettings
from pierhead.events import ignore
from pierhead.paths import Paths
from pierhead.refs import parse
from pierhead.registry.name import image_name
from pierhead.registry.publish import push_model
from pierhead.sources.pull import pull
from pierhead.store.layout import Store

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif("PIERHEAD_TEST_IMAGE" not in os.environ, reason="no test registry here (scripts/test-host)"),
]


@pytest.fixture
async def pushed(home: Paths, smollm2: Path) -> str:
    """The place of a real model in the registry."""
    host = os.environ["PIERHEAD_TEST_IMAGE"].partition("/")[0]
    where = f"{host}/models/{uuid.uuid4().hex[:12]}:v1"
    store, settings = Store.open(home.store), SourceSettings()
    await pull(str(smollm2), store=store, settings=settings, paths=home, name="mine")
    await push_model(store, "mine", image_name(parse(where)), settings=settings, env={}, listener=ignore)
    return where


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_oras_lays_the_files_out_under_their_names(pushed: str, tmp_path: Path, smollm2: Path) -> None:
    from oras.client import OrasClient

    client = OrasClient(hostname=pushed.partition("/")[0], insecure=True)
    files = client.pull(target=pushed, outdir=str(tmp_path / "out"))
    found = {Path(f).name: hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files}
    assert found[smollm2.name] == hashlib.sha256(smollm2.read_bytes()).hexdigest()


@pytest.mark.parametrize("program", ["podman", "buildah"])
def test_podman_and_buildah_know_it_for_an_artifact(pushed: str, tmp_path: Path, program: str) -> None:
    """Debian's versions pull no artifacts; they read the manifest and say what it is, rather than that it is broken."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    with tempfile.TemporaryDirectory(prefix="pd") as short:  # Podman wants a path of 50 characters at most
        storage = ("--root", f"{short}/root", "--runroot", f"{short}/run", "--storage-driver", "vfs")
        argv = [program, *storage, "pull", "--tls-verify=false", pushed]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert "artifact with type" in done.stderr
    assert "application/vnd.docker.ai.model.config" in done.stderr


def test_podman_lists_the_tags(pushed: str) -> None:
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")
    repository, _, tag = pushed.rpartition(":")
    argv = ["podman", "search", "--tls-verify=false", "--list-tags", repository]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert [repository, tag] in [line.split() for line in done.stdout.splitlines()]
