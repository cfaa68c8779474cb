"""How the commands tell of a model with several replicas."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from pierhead.cli import operate

ONE = {
    "id": "r1",
    "model": "m",
    "digest": "sha256:m",
    "state": "ready",
    "runtime": "process",
    "context": 512,
    "memory_estimate": 1 << 20,
    "requests_open": 0,
    "started": "2026-01-01T00:00:00Z",
    "expires_at": None,
    "pinned": False,
    "wanted": 2,
    "error": None,
}
LACKS = {**ONE, "id": "r2", "state": "failed", "error": {"code": "out_of_memory", "message": "m needs 9 GiB"}}


def told(monkeypatch: pytest.MonkeyPatch, found: list[dict[str, Any]]) -> str:
    monkeypatch.setattr(operate, "running", lambda client: found)
    result = CliRunner().invoke(operate.ps, [])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_ps_says_how_many_of_those_wanted_answer_and_why_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(monkeypatch, [ONE, LACKS])
    assert "r1" in text
    assert "m: 1 of 2 replicas answer: m needs 9 GiB" in text


def test_a_single_replica_that_failed_is_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(monkeypatch, [{**LACKS, "wanted": 1}])
    assert "m: m needs 9 GiB" in text
    assert "replicas answer" not in text
