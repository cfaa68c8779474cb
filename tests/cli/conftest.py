"""A home of its own with SmolLM2 in the store, and the command as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pierhead.formats.gguf import read_file, summary
from pierhead.paths import Paths, resolve
from pierhead.store.layout import Store
from pierhead.store.media import GGUF
from pierhead.store.model import Layer

Pier = Callable[..., subprocess.CompletedProcess[str]]


def environment(folder: Path) -> dict[str, str]:
    """What a newcomer's shell has, with everything below ``folder``."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PIERHEAD_") and k != "DOCKER_HOST"}
    own = {"PIERHEAD_HOME": str(folder), "PIERHEAD_GATEWAY__LISTEN": "127.0.0.1:0", "NO_COLOR": "1", "COLUMNS": "100"}
    return {**keep, **own, "PIERHEAD_ENGINE__CONTEXT": "1024", "PIERHEAD_RUNTIME__DEFAULT": "process"}


def command(env: dict[str, str]) -> Pier:
    """``pier(*args)``: a whole process, its output as text, never longer than a minute."""

    def run(*args: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pierhead.cli.main", *args],
            env={**env, **more},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def bare(tmp_path: Path) -> Pier:
    """The command in an empty home."""
    return command(environment(tmp_path / "home"))


@pytest.fixture(scope="module")
def stocked(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pier, Paths, dict[str, str]]]:
    """The command in a home that has SmolLM2; its daemon is ended afterwards."""
    env = environment(tmp_path_factory.mktemp("cli") / "h")
    paths = resolve(env)
    store = Store.open(paths.store)
    blob = store.adopt_file(smollm2)
    layer = Layer(blob.digest, blob.size, GGUF, "model.gguf")
    store.commit_model("smollm2", layers=[layer], metadata=summary(read_file(smollm2)))
    pier = command(env)
    yield pier, paths, env
    pier("stop", "--all", "--daemon")
