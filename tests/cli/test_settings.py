"""The verb settings as far as no model must run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Pier = Callable[..., subprocess.CompletedProcess[str]]


def test_all_settings_of_a_python_model_are_shown_with_those_of_its_class(bare: Pier, tmp_path: Path) -> None:
    file = tmp_path / "twice.py"
    file.write_text(
        "class Twice:\n    max_batch_size = 16\n    def predict(self, xs: list[int]) -> list[int]:\n        return xs\n"
    )
    assert bare("package", str(file), "twice").returncode == 0
    try:
        found = {
            s["name"]: s["value"] for s in json.loads(bare("settings", "twice", "--all", "--json").stdout)["settings"]
        }
        assert (found["max_batch_size"], found["concurrency"]) == (16, 1)
        refused = bare("settings", "set", "*", "foo=2")
        assert "no engine has a setting 'foo'" in refused.stderr
        assert refused.returncode == 2
    finally:
        bare("stop", "--all", "--daemon")
