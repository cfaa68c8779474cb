"""A home with SmolLM2 whose environments are those of this checkout's cache, and a GGUF in 16 bits made of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pierhead.paths import Paths, resolve
from pierhead.store.layout import Store

ROOT = Path(__file__).resolve().parents[2]
LICENCE = "Copyright: everybody. Do what you like.\n"
# Enough tokens for one window of perplexity.
STORY = "A man walked down to the sea. He sat on a stone, and he looked at the water for a long time. " * 30


@dataclass
class Bench:
    """The command, its folders and its environment."""

    paths: Paths
    env: dict[str, str]

    def pier(self, *args: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*args), env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def argv(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "pierhead.cli.main", *args]

    def ok(self, *args: str) -> str:
        done = self.pier(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def store(self) -> Store:
        return Store.open(self.paths.store)

    @property
    def left_over(self) -> list[str]:
        """What unfinished work left in the store's folder."""
        return [p.name for p in self.paths.store.iterdir() if p.name.startswith((".quantize", ".convert"))]


@pytest.fixture(scope="module")
def workbench(smollm2: Path) -> Iterator[Bench]:
    """SmolLM2 as it is, and ``wide``: the same in F16, with a licence."""
    with tempfile.TemporaryDirectory(prefix="pier-", dir="/tmp") as home:
        env = {k: v for k, v in os.environ.items() if not k.startswith("PIERHEAD_") and k != "DOCKER_HOST"}
        env |= {
            "PIERHEAD_HOME": home,
            "PIERHEAD_GATEWAY__LISTEN": "127.0.0.1:0",
            "PIERHEAD_RUNTIME__DEFAULT": "process",
            "PIERHEAD_RUNTIME__ENVIRONMENTS": str(ROOT / ".cache" / "engines"),
            "PIERHEAD_ENGINE__THREADS": "1",
            "PIERHEAD_ENGINE__CONTEXT": "512",
            "NO_COLOR": "1",
        }
        bench = Bench(resolve(env), env)
        licence = Path(home) / "LICENCE"
        licence.write_text(LICENCE)
        bench.ok("package", str(smollm2), "smollm2", "--license", str(licence), "--context-size", "300")
        bench.ok("quantize", "smollm2", "wide", "--type", "F16", "--allow-requantize", "--no-perplexity")
        yield bench
        bench.pier("stop", "--all", "--daemon")


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """A text to measure on."""
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    return file
