"""Whole daemons in homes of their own, with the real model in their stores."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from pierhead.daemon.client import Client
from pierhead.formats import gguf
from pierhead.paths import Paths, resolve
from pierhead.store.layout import Store
from pierhead.store.model import Layer

GGUF = "application/vnd.docker.ai.gguf.v3"


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout: float = 60) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(self.timeout)
            sock.connect(str(self.path))
        except BaseException:
            sock.close()
            raise
        self.sock = sock


@dataclass
class House:
    """One installation; ``start`` runs a daemon in the foreground and returns once it listens or has failed."""

    paths: Paths
    env: dict[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def client(self) -> Client:
        return Client(self.paths)

    def launch(self, *args: str, version: str = "", **env: str) -> tuple[subprocess.Popen[bytes], int]:
        """A daemon and the pipe on which it announces itself."""
        read, write = os.pipe()
        code = f"import pierhead; pierhead.__version__ = {version!r}; from pierhead.daemon.main import main; main()"
        run = ["-c", code] if version else ["-m", "pierhead.daemon"]
        with (self.paths.runtime.parent / "serve.log").open("ab") as log:
            daemon = subprocess.Popen(
                [sys.executable, *run, "--ready-fd", str(write), *args],
                env=self.env | env,
                pass_fds=(write,),
                stdout=log,
                stderr=log,
            )
        os.close(write)
        self.daemons.append(daemon)
        return daemon, read

    def start(self, *args: str, version: str = "", **env: str) -> dict[str, Any]:
        """What the daemon announces: ``pid`` and ``listeners``, or ``error``; {} when it died."""
        _, read = self.launch(*args, version=version, **env)
        return self.heard(read)

    @staticmethod
    def heard(fd: int, timeout: float = 30) -> dict[str, Any]:
        """The one line a daemon writes on its pipe; {} when it died before."""
        with os.fdopen(fd, "rb") as pipe:
            assert select.select([pipe], [], [], timeout)[0], "the daemon said nothing"
            line = pipe.readline()
        return json.loads(line) if line else {}

    def stock(self, name: str, file: Path, like: Path) -> None:
        """Put one more model into the store."""
        commit(self.paths.store, name, file, like)

    def kill(self) -> None:
        """``kill -9`` of the daemon that was started last."""
        self.daemons[-1].kill()
        self.daemons[-1].wait(10)

    def chat(self, model: str = "smollm2", tokens: int = 4, **extra: Any) -> tuple[int, dict[str, Any]]:
        """One answer of the gateway: status and body."""
        connection, response = self.ask(model, tokens, **extra)
        with contextlib.closing(connection):
            return response.status, json.loads(response.read())

    def ask(
        self,
        model: str = "smollm2",
        tokens: int = 4,
        headers: dict[str, str] | None = None,
        prompt: str = "Count from one to one hundred.",
        **extra: Any,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = UnixConnection(self.paths.gateway_socket)
        body = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **extra}
        body["messages"] = [{"role": "user", "content": prompt}]
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers or {})
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def processes(self) -> list[psutil.Process]:
        """Everything of this installation that runs."""
        home = self.env["PIERHEAD_HOME"]
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if process.status() != psutil.STATUS_ZOMBIE and (
                    process.environ().get("PIERHEAD_HOME") == home or home in words
                ):
                    found.append(process)
        return found

    @property
    def left(self) -> list[str]:
        """The command lines of what runs."""
        return [" ".join(p.cmdline()) for p in self.processes()]

    def left_after(self, seconds: float) -> list[str]:
        """What still runs when everything that is about to end has had time to."""
        psutil.wait_procs(self.processes(), timeout=seconds)
        return self.left

    def clear(self) -> None:
        """End everything."""
        for daemon in self.daemons:
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(15)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for daemon in self.daemons:
            daemon.wait(10)


@pytest.fixture(scope="session")
def stocked(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has SmolLM2, to be copied by hard links."""
    root = tmp_path_factory.mktemp("stocked") / "store"
    commit(root, "smollm2", smollm2, smollm2)
    return root


def commit(root: Path, name: str, file: Path, like: Path) -> None:
    """Put ``file`` into the store at ``root`` with the header of ``like``."""
    store = Store.open(root)
    blob = store.adopt_file(file)
    layer = Layer(blob.digest, blob.size, GGUF, file.name)
    summary = gguf.summary(gguf.read_file(like))
    store.materialize(store.commit_model(name, layers=[layer], metadata=summary, annotations={}))


@pytest.fixture
def house(stocked: Path) -> Iterator[House]:
    """An installation with SmolLM2 and no daemon yet; everything it starts is gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="pier-"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIERHEAD_") and k != "DOCKER_HOST"}
    env |= {
        "PIERHEAD_HOME": str(home),
        "PIERHEAD_GATEWAY__LISTEN": "127.0.0.1:0",
        "PIERHEAD_ENGINE__CONTEXT": "1024",
        "PIERHEAD_ENGINE__THREADS": "1",  # engines that wait for each other spin: one thread each keeps tests quick
        "PIERHEAD_RUNTIME__DEFAULT": "process",
        "PIERHEAD_FLEET__BACKOFF_INITIAL": "0.05",
        "PIERHEAD_FLEET__DRAIN_TIMEOUT": "60",
    }
    paths = resolve(env)
    paths.state.mkdir(parents=True)
    shutil.copytree(stocked, paths.store, copy_function=_link)
    house = House(paths, env)
    try:
        yield house
    finally:
        house.clear()
        shutil.rmtree(home, ignore_errors=True)


def _link(source: str, target: str) -> None:
    if "/blobs/" in source or "/models/" in source:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


@pytest.fixture
def running(house: House) -> House:
    """An installation whose daemon runs."""
    said = house.start()
    assert "error" not in said, said
    assert said
    return house
