"""Fixtures of the registry's tests: a real registry of one's own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from .doubles import Double, serving

# htpasswd with bcrypt, the only kind that the registry takes: user ali, password open-sesame
HTPASSWD = "ali:$2b$04$qghlzBGYsFCNSTBjm52OR.VZkv8Zp0IAoqA5YM8Ror6aBl46S66qG\n"
USER, PASSWORD = "ali", "open-sesame"
StartRegistry = Callable[..., str]


@pytest.fixture
def start_registry(tmp_path: Path) -> Generator[StartRegistry]:
    """Start a real docker-registry on loopback; its ``host:port``. Keywords become top-level keys of its config."""
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed")
    started: list[subprocess.Popen[str]] = []
    drains: list[threading.Thread] = []

    def start(**config: Any) -> str:
        folder = tmp_path / f"registry{len(started)}"
        folder.mkdir()
        http = {"addr": "127.0.0.1:0", **config.pop("http", {})}
        whole = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": http,
            **config,
        }
        (folder / "config.yml").write_text(json.dumps(whole))  # JSON is YAML
        process = subprocess.Popen(
            ["docker-registry", "serve", str(folder / "config.yml")], stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if "listening on " in line:
                address = line.partition("listening on ")[2].partition('"')[0].partition(",")[0].strip()
                drains.append(threading.Thread(target=process.stderr.read, daemon=True))
                drains[-1].start()
                return address
        raise AssertionError("the registry ended")

    yield start
    for process in started:
        process.terminate()
        process.wait(20)
    for thread in drains:
        thread.join(20)
    for process in started:
        if process.stderr is not None:
            process.stderr.close()


@pytest.fixture
def guarded_registry(start_registry: StartRegistry, tmp_path: Path) -> str:
    """A real registry that wants user and password."""
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    return start_registry(auth={"htpasswd": {"realm": "test", "path": str(tmp_path / "htpasswd")}})


@pytest.fixture
async def double() -> AsyncGenerator[Double]:
    """A registry that does as it is told."""
    async with serving(Double()) as found:
        yield found


@pytest.fixture
def unused() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
