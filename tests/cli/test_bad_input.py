"""What bad input gets: one message that says what failed, why and what to type; the right status; nothing half-done."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Pier = Callable[..., subprocess.CompletedProcess[str]]

CASES: list[tuple[list[str], int, str]] = [
    (["frobnicate"], 2, "no command 'frobnicate'"),
    (["lst"], 2, "Did you mean `pier list`?"),
    (["create", "x"], 2, "`pier package` makes a model"),
    (["start", "x"], 2, "`pier run MODEL`"),
    (["search", "qwen"], 2, "`pier pull hf:ORG/REPO`"),
    (["run"], 2, "Missing argument"),
    (["run", "smollm2", "hi", "--temperature", "warm"], 2, "warm"),
    (["run", "a b", "hi"], 2, "not a reference"),
    (["pull", "hf:nonsense"], 2, "Write hf:org/repo"),
    (["pull", "https:///x"], 2, "https://host/path/model.gguf"),
    (["pull", "./missing.gguf"], 3, "missing.gguf"),
    (["inspect", "./missing.gguf"], 3, "missing.gguf"),
    (["rm", "ghost"], 3, "pier list"),
    (["tag", "ghost", "x"], 3, "pier list"),
    (["history", "ghost"], 3, "pier list"),
    (["verify", "reg.example/team/m:1", "--key", "KEY"], 3, "there is no key"),
    (["referrers", "reg.example/team/m:1"], 3, "oci://reg.example/team/m:1"),
    (["pull", "oci://127.0.0.1:1/team/m:1"], 6, "cannot talk to 127.0.0.1:1: Connection refused"),
    (["export", "ghost", "-o", "/does/not/exist/m.tar"], 3, "no folder /does/not/exist"),
    (["pull", "smollm2:nope"], 3, "Did you mean smollm2, smollm2:135m"),
    (["import", __file__], 5, "it is no tar archive"),
    (["logs", "ghost"], 3, "pier run ghost"),
    (["stop", "ghost"], 3, "pier run ghost"),
    (["stop"], 2, "pier ps"),
    (["run", "x", "hi", "--option", "novalue"], 2, "NAME=VALUE"),
    (["run", "x", "hi", "--keep-alive", "soon"], 2, "90s, 5m, 1h"),
    (["run", "x", "hi", "--format", "{nope"], 2, "JSON schema"),
    (["run", "x", "hi", "--file", "/does/not/exist"], 2, "cannot read"),
    (["serve", "--listen", "nonsense"], 2, "nonsense"),
    (["lora", "add", "smollm2", "./nope.gguf"], 3, "there is no file ./nope.gguf"),
    (["package", "README.txt", "x"], 3, "there is no file and no model 'README.txt'"),
    (["bench", "--compare", "OLD", "nofile.json"], 3, "cannot read nofile.json"),
]


def one_message(done: subprocess.CompletedProcess[str]) -> str:
    """The only error printed; never a traceback, never on stdout."""
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(re.findall(r"(?i)^error:", done.stderr, re.M)) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(("args", "code", "words"), CASES, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_a_wrong_command_is_answered_with_what_to_type(
    bare: Pier, tmp_path: Path, args: list[str], code: int, words: str
) -> None:
    (tmp_path / "old.json").write_text("{}")
    done = bare(*(word if word != "OLD" else str(tmp_path / "old.json") for word in args))
    assert words in one_message(done)
    assert done.returncode == code


def test_errors_are_json_for_programs(bare: Pier) -> None:
    done = bare("rm", "ghost", "--json")
    assert done.returncode == 3
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "not_found"
    assert error["hint"]


@pytest.mark.parametrize("data", [b"", b"GGUF", b"not a model at all", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_damaged_file_is_refused_and_leaves_nothing(bare: Pier, tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(data)
    done = bare("pull", str(file))
    assert done.returncode == 5, done.stderr
    one_message(done)
    assert json.loads(bare("list", "--json").stdout) == []
    assert bare("prune").returncode == 0
    assert json.loads(bare("df", "--json").stdout)["blobs"] == 0


def test_a_truncated_model_is_refused(bare: Pier, tmp_path: Path, smollm2: Path) -> None:
    file = tmp_path / "cut.gguf"
    with smollm2.open("rb") as source:
        file.write_bytes(source.read(50 << 20))
    done = bare("pull", str(file))
    assert done.returncode == 5, done.stderr
    one_message(done)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_and_leaves_nothing(bare: Pier, tmp_path: Path, smollm2: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], check=True)
    try:
        done = bare("pull", str(smollm2), PIERHEAD_HOME=str(disk))
        assert done.returncode == 8, done.stderr
        assert "pier df" in one_message(done)
        assert json.loads(bare("list", "--json", PIERHEAD_HOME=str(disk)).stdout) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_port_in_use_is_named(bare: Pier) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = bare("serve", "--listen", address)
    assert done.returncode == 4, done.stderr
    assert address in one_message(done)


def test_listening_beyond_loopback_needs_a_key(bare: Pier) -> None:
    done = bare("serve", "--listen", "0.0.0.0:0")
    assert done.returncode == 7, done.stderr
    assert "pier key create" in one_message(done)


@pytest.mark.parametrize("text", ["[gateway\n", "[gatway]\nx=1\n", '[gateway]\nmax_body = "x"\n', "\xff"])
def test_a_settings_file_that_cannot_be_read_is_named(bare: Pier, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "home" / "config"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_bytes(text.encode("latin-1"))
    for verb in (["serve"], ["pull", "smollm2"]):
        done = bare(*verb)
        assert done.returncode == 2, done.stderr
        assert "config.toml" in one_message(done)


def test_a_docker_socket_that_cannot_be_used_is_said(bare: Pier, tmp_path: Path, smollm2: Path) -> None:
    bare("pull", str(smollm2), "--name", "m")
    try:
        done = bare("run", "m", "hi", "--runtime", "docker", PIERHEAD_RUNTIME__DOCKER_HOST=f"unix://{tmp_path}/no.sock")
        assert done.returncode in (7, 10), done.stderr
        one_message(done)
    finally:
        bare("stop", "--all", "--daemon")
