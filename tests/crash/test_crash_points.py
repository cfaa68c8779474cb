"""Whatever an operation on the store was doing when it died, nothing is lost, and doing it again ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .scenarios import RACES, SCENARIOS

ROOT = Path(__file__).resolve().parents[2]
REGISTRY, WHY = os.environ.get("PIERHEAD_TEST_IMAGE"), "no test registry here (scripts/test-host)"
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs to a real disk take minutes."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        yield Path(folder)


def counted(name: str, memory: Path) -> dict[str, int]:
    """Run the program that tries one operation's points; how many there were."""
    argv = [sys.executable, "-m", "tests.crash.scenarios", name, str(memory)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_operation_that_dies_at_any_point_loses_nothing(name: str, memory: Path) -> None:
    if "registry" in name and REGISTRY is None:
        pytest.skip(WHY)
    counts = counted(name, memory)
    assert counts["kills"] >= 5
    assert counts.get("cuts", 10) >= 10
    assert counts.get("full", 16) >= 16


@pytest.mark.parametrize("name", RACES)
def test_a_collector_or_remover_that_comes_at_any_point_takes_nothing_that_is_needed(name: str, memory: Path) -> None:
    assert counted(name, memory)["races"] >= 8


@pytest.mark.skipif(REGISTRY is None, reason=WHY)
def test_a_push_that_dies_between_any_two_requests_is_made_good_by_the_next(memory: Path) -> None:
    assert counted("push", memory)["pushes"] >= 20
