"""What a machine that is not as it should be gets: one message, the right status, nothing half-done."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer

import pytest

from pierhead.paths import Paths, resolve

Pier = Callable[..., subprocess.CompletedProcess[str]]
Stocked = tuple[Pier, Paths, dict[str, str]]


@contextmanager
def daemon_of_version(paths: Paths, version: str) -> Iterator[None]:
    """A daemon that answers ``/version`` and nothing else."""
    body = json.dumps({"version": version, "api": 1, "pid": os.getpid(), "started": "2026-01-01T00:00:00Z"}).encode()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/v1/version" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    paths.runtime.mkdir(parents=True)
    with UnixStreamServer(str(paths.control_socket), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def one_message(done: subprocess.CompletedProcess[str]) -> str:
    """The only error that was printed."""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error:") == 1, done.stderr
    return done.stderr


def test_a_newer_daemon_is_named_and_left_alone(bare: Pier, tmp_path: Path, smollm2: Path) -> None:
    assert bare("pull", str(smollm2), "--name", "m").returncode == 0
    paths = resolve({"PIERHEAD_HOME": str(tmp_path / "home")})
    with daemon_of_version(paths, "99.1.0"):
        done = bare("run", "m", "Hi")
        assert done.returncode == 12
        said = one_message(done)
        assert "99.1.0" in said
        assert "pier stop --all --daemon" in said
        assert json.loads(bare("version", "--json").stdout)["daemon"] == "99.1.0"
        assert bare("list", "-q").stdout == "m\n"


@pytest.mark.model
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="giving up a capability needs root")
def test_a_docker_socket_without_permission_is_named_and_doctor_says_what_to_do(
    stocked: Stocked, tmp_path: Path
) -> None:
    pier, _, env = stocked
    pier("stop", "--all", "--daemon")
    path = tmp_path / "docker.sock"
    plain = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-m", "pierhead.cli.main"]

    def powerless(*args: str) -> subprocess.CompletedProcess[str]:
        own = {**env, "PIERHEAD_RUNTIME__DOCKER_HOST": f"unix://{path}"}
        return subprocess.run(
            [*plain, *args], env=own, input="", capture_output=True, text=True, timeout=60, check=False
        )

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        os.chown(path, 12345, 12345)
        path.chmod(0o600)
        done = powerless("run", "smollm2", "Hi", "--runtime", "docker")
        doctor = powerless("doctor").stdout
    pier("stop", "--all", "--daemon")
    said = one_message(done)
    assert done.returncode in (7, 10), said
    assert f"{path} is not for this user" in said
    assert "usermod -aG docker" in said + doctor


def test_a_home_that_cannot_be_made_is_named(bare: Pier) -> None:
    for verb in (["list"], ["run", "smollm2", "Hi"], ["key", "list"], ["df"]):
        done = bare(*verb, PIERHEAD_HOME="/proc/none")
        assert done.returncode != 0
        assert "/proc/none" in one_message(done)


def test_a_pipe_that_is_not_text_is_refused_before_anything_starts(bare: Pier) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pierhead.cli.main", "run", "smollm2"],
        input=b"\xff\xfe\x00",
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 2
    assert b"is not text" in done.stderr


@pytest.mark.parametrize("name", ["binary.bin", "large.txt", "folder"])
def test_a_file_that_cannot_be_a_prompt_is_refused(bare: Pier, tmp_path: Path, name: str) -> None:
    (tmp_path / "binary.bin").write_bytes(b"\x00\x01\x02")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(9 << 20)
    done = bare("run", "smollm2", "Hi", "--file", str(tmp_path / name))
    assert done.returncode == 2
    assert name in one_message(done)
    assert bare("list", "-q").stdout == ""


@pytest.mark.model
def test_a_blob_that_was_damaged_is_not_run(stocked: Stocked, tmp_path: Path, smollm2: Path) -> None:
    pier = stocked[0]
    home = tmp_path / "h"
    own = {"PIERHEAD_HOME": str(home)}
    assert pier("pull", str(smollm2), "--name", "hurt", **own).returncode == 0
    for blob in (home / "state" / "store" / "blobs" / "sha256").iterdir():
        if blob.stat().st_size > 1 << 20:
            blob.chmod(0o644)
            os.truncate(blob, 60 << 20)
    try:
        done = pier("run", "hurt", "Hi", **own)
        assert done.returncode in (5, 11), done.stderr
        said = one_message(done)
        assert "pier" in said
        assert done.stdout == ""
    finally:
        pier("stop", "--all", "--daemon", **own)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FLEET__MEMORY_BUDGET", "lots", "'lots' is no size of memory"),
        ("FLEET__MEMORY_BUDGET", "100MiB", "leaves nothing for models"),
        ("GATEWAY__LISTEN", "foo", "'foo' is not an address"),
        ("GATEWAY__LISTEN", "TAKEN", "another program does"),
        ("RUNTIME__DEFAULT", "podman", "there is no runtime 'podman'"),
    ],
)
def test_doctor_fails_for_settings_with_which_nothing_would_start(
    bare: Pier, name: str, value: str, words: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        there = f"127.0.0.1:{taken.getsockname()[1]}"
        done = bare("doctor", **{f"PIERHEAD_{name}": value.replace("TAKEN", there)})
    assert words in done.stdout
    assert done.returncode == 1


def test_doctor_says_which_settings_a_running_daemon_does_not_have(bare: Pier) -> None:
    try:
        assert bare("settings", "*").returncode == 0  # starts a daemon
        assert "other settings" not in bare("doctor").stdout
        done = bare("doctor", PIERHEAD_FLEET__MEMORY_BUDGET="3GiB")
        assert "other settings: fleet.memory_budget" in done.stdout
    finally:
        bare("stop", "--all", "--daemon")
