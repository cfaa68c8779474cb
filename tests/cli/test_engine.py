"""The verbs about engines: lists, templates that are checked, packages that are removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pierhead.cli.main import cli
from pierhead.config import load


@pytest.fixture
def pier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PIERHEAD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIERHEAD_RUNTIME__ENVIRONMENTS", str(tmp_path / "environments"))

    def run(*args: str) -> Any:
        return CliRunner().invoke(cli, args)

    return run


TEMPLATE = """
[engines.mine]
title = "Mine"
formats = ["gguf"]
serves = ["chat"]
command = ["no-such-program-here", "$(PORT)", "{context}"]
settings = { context = 7 }
"""


def environment(folder: Path, name: str, *, whole: bool = True) -> Path:
    place = folder / "environments" / name
    place.mkdir(parents=True)
    (place / "data").write_bytes(bytes(1000))
    (place / "bin").mkdir()
    (place / "bin" / "python").touch()
    if whole:
        (place / "ready.json").write_text("{}")
    return place


def test_what_an_engine_serves_is_told_in_the_words_of_clients(pier: Any) -> None:
    serves = pier("engine", "show", "llamacpp").output.partition("Serves")[2].partition("\n")[0]
    assert "rerank" in serves
    assert "llamacpp-" not in serves
    listed = next(line for line in pier("engine", "list").output.splitlines() if line.startswith("llamacpp"))
    assert "rerank" in listed


def test_all_engines_are_listed_with_what_they_take(pier: Any, tmp_path: Path) -> None:
    environment(tmp_path, "onnx-0123456789ab")
    environment(tmp_path, "python-0123456789ab", whole=False)
    (tmp_path / "home" / "config").mkdir(parents=True)
    (tmp_path / "home" / "config" / "config.toml").write_text(TEMPLATE)
    found = {one["name"]: one for one in json.loads(pier("engine", "list", "--json").stdout)}
    assert {"llamacpp", "onnx", "python", "vllm", "mine"} <= set(found)
    assert (found["onnx"]["installed"], found["onnx"]["bytes"]) == (True, 1002)
    assert (found["python"]["installed"], found["python"]["bytes"]) == (False, 0)
    assert found["llamacpp"]["installed"]
    assert found["mine"]["template"]
    shown = pier("engine", "list").stdout
    assert "built in" in shown
    assert "not installed" in shown
    assert "while it runs" in pier("engine", "show", "vllm").stdout


def test_what_was_never_run_says_so(pier: Any) -> None:
    found = {one["name"]: one for one in json.loads(pier("engine", "list", "--json").stdout)}
    tried = {name: one["tried"] for name, one in found.items()}
    assert (tried["llamacpp"], tried["vllm"], tried["sglang"]) == ("in part", "in part", "never")
    assert not found["sglang"]["installed"]
    assert all(one["untested"] for one in found.values() if one["tried"] != "yes")
    shown = next(line for line in pier("engine", "list").stdout.splitlines() if "sglang" in line)
    assert "never" in shown
    assert "built in" not in shown
    assert "All of it" in pier("engine", "show", "sglang").stdout


def test_a_template_is_checked_without_being_installed(pier: Any, tmp_path: Path) -> None:
    file = tmp_path / "engines.toml"
    file.write_text(TEMPLATE)
    assert load(file, {}).settings.engines
    done = pier("engine", "check", str(file))
    assert done.exit_code == 0
    assert "mine: serves chat with gguf" in done.stdout
    assert "no-such-program-here is not on this machine" in done.stderr
    file.write_text(TEMPLATE.replace("{context}", "{contxt}"))
    refused = pier("engine", "check", str(file))
    assert refused.exception.hint == "Did you mean 'context'?"
    file.write_text("")
    assert "describes no engine" in pier("engine", "check", str(file)).exception.message


def test_packages_are_removed_by_engine_and_never_without_saying_whose(pier: Any, tmp_path: Path) -> None:
    kept, gone = environment(tmp_path, "onnx-0123456789ab"), environment(tmp_path, "python-0123456789ab")
    assert pier("engine", "prune").exception.message == "say whose packages to remove"
    assert "Did you mean 'python'?" in pier("engine", "prune", "pyton").exception.hint
    assert json.loads(pier("engine", "prune", "python", "--json").stdout)["removed"] == [gone.name]
    assert kept.is_dir()
    assert not gone.exists()
