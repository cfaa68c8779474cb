"""Whatever an operation on the store was doing when it died, nothing is lost, and doing it again ends the same."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .crash_scenarios import SCENARIOS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs to a real disk take minutes."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_operation_that_dies_at_any_point_loses_nothing(name: str, memory: Path) -> None:
    argv = [sys.executable, "-m", "tests.store.crash_scenarios", name, str(memory)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] >= 5
    assert counts["cuts"] >= 10
    assert counts["full"] >= 16
