"""Whole installations: a daemon of its own with the real model, in a sandboxed process and on a real Docker Engine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pierhead.daemon.client import Client
from pierhead.paths import Paths, resolve

PIER = [sys.executable, "-m", "pierhead.cli.main"]


@dataclass
class Installation:
    """One home with a daemon that runs; ``address`` is where its gateway listens."""

    paths: Paths
    env: dict[str, str]
    address: str

    def pier(self, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one command to its end; its output is text."""
        options = {"capture_output": True, "text": True, "timeout": 120, "check": False} | options
        return subprocess.run([*PIER, *args], env=self.env, **options)


@contextlib.contextmanager
def installed(model: Path, **settings: str) -> Iterator[Installation]:
    """Pull ``model`` as ``smollm2`` and serve it on a free port until the end."""
    home = Path(tempfile.mkdtemp(prefix="pier-e2e-"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIERHEAD_") and k != "DOCKER_HOST"}
    env |= {"PIERHEAD_HOME": str(home), "PIERHEAD_GATEWAY__LISTEN": "127.0.0.1:0", "NO_COLOR": "1"}
    env |= {"PIERHEAD_ENGINE__CONTEXT": "2048", **settings}
    paths = resolve(env)
    subprocess.run([*PIER, "pull", str(model), "--name", "smollm2"], env=env, check=True, timeout=120)
    client = Client(paths)
    log = (home / "serve.log").open("wb")
    daemon = subprocess.Popen([*PIER, "serve"], env=env, stdout=subprocess.DEVNULL, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while client.version() is None or not (status := client.request("GET", "/status"))["listeners"]:
            assert daemon.poll() is None, (home / "serve.log").read_text()
            assert time.monotonic() < deadline, "the daemon did not come up within a minute"
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(0.05)
        yield Installation(paths, env, status["listeners"][0])
    finally:
        daemon.terminate()
        daemon.wait(60)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def process_home(smollm2: Path) -> Iterator[Installation]:
    """SmolLM2 behind the gateway, each replica a sandboxed process."""
    with installed(smollm2, PIERHEAD_RUNTIME__DEFAULT="process") as found:
        yield found


@pytest.fixture(scope="module")
def ollama_home(smollm2: Path) -> Iterator[Installation]:
    """One for tests that change its models, by Ollama's and KServe's clients."""
    with installed(smollm2, PIERHEAD_RUNTIME__DEFAULT="process", PIERHEAD_ENGINE__THREADS="1") as found:
        yield found


@pytest.fixture(scope="session")
def sight(process_home: Installation, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2 with eyes that see nothing, and a seed that lets it answer briefly; served by ``process_home``."""
    eyes = tmp_path_factory.mktemp("eyes") / "mmproj.gguf"
    write_eyes(eyes)
    made = process_home.pier(
        "package", "--from", "smollm2", "--mmproj", str(eyes), "--option", "sampling.seed=5", "sight"
    )
    assert made.returncode == 0, made.stderr
    return "sight"


def write_eyes(path: Path, width: int = 576, hidden: int = 32, size: int = 56, patch: int = 14) -> None:
    """A vision tower of two layers with random weights: pictures take the real way and mean nothing."""
    import gguf
    import numpy

    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    writer.add_string("clip.projector_type", "mlp")
    sizes = {"image_size": size, "patch_size": patch, "embedding_length": hidden, "feed_forward_length": 2 * hidden}
    for name, value in (sizes | {"block_count": 2, "projection_dim": width, "attention.head_count": 2}).items():
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)

    def add(name: str, *shape: int) -> None:
        parts = {"weight": shape, "bias": shape[:1]} if name.startswith(("v.blk", "mm.")) else {"weight": shape}
        for part, size in parts.items():
            writer.add_tensor(f"{name}.{part}", (random.standard_normal(size) * 0.02).astype(numpy.float32))

    add("v.patch_embd", hidden, 3, patch, patch)
    add("v.position_embd", (size // patch) ** 2, hidden)
    for block in ("v.blk.0", "v.blk.1"):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add(f"{block}.{name}", hidden, hidden)
        for name in ("ln1", "ln2"):
            add(f"{block}.{name}", hidden)
        add(f"{block}.ffn_up", 2 * hidden, hidden)
        add(f"{block}.ffn_down", hidden, 2 * hidden)
    add("mm.0", width, hidden)
    add("mm.2", width, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def docker_home(smollm2: Path) -> Iterator[Installation]:
    """SmolLM2 behind the gateway, each replica a container of a real Docker Engine."""
    host = os.environ.get("PIERHEAD_TEST_DOCKER")
    if not host:
        pytest.skip(
            "no Docker Engine: " + os.environ.get("PIERHEAD_TEST_DOCKER_REASON", "PIERHEAD_TEST_DOCKER is unset")
        )
    mirrors = json.dumps({"docker.io": [os.environ["PIERHEAD_TEST_REGISTRY"]]})
    with installed(
        smollm2,
        PIERHEAD_RUNTIME__DEFAULT="docker",
        PIERHEAD_RUNTIME__DOCKER_HOST=host,
        PIERHEAD_RUNTIME__MIRRORS=mirrors,
    ) as found:
        yield found


@pytest.fixture(params=["process", "docker"])
def home(request: pytest.FixtureRequest) -> Installation:
    """Both kinds of installation, one after the other."""
    found: Installation = request.getfixturevalue(f"{request.param}_home")
    return found
