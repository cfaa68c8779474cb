"""Real servers of the speech engine, in the environment that the process runtime would make for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.conftest import CACHE

from pierhead.config import Settings
from pierhead.engines.base import LaunchSpec, PlanRequest
from pierhead.engines.serving import PROGRAMS
from pierhead.engines.whisper import WHEELS, make
from pierhead.events import ignore
from pierhead.formats.reading import File
from pierhead.formats.summarize import summarize
from pierhead.runtimes.base import Places, expand
from pierhead.runtimes.environment import Environments
from pierhead.store.classify import classify
from pierhead.store.model import ModelFile

from . import models


def environments() -> Path:
    """Where engines' environments are kept between runs."""
    return Path(os.environ.get("PIERHEAD_RUNTIME__ENVIRONMENTS") or CACHE / "engines")


def request(folder: Path, **settings: Any) -> PlanRequest:
    """What the fleet would ask for a model in this folder."""
    paths = sorted(p for p in folder.iterdir() if p.is_file())
    files = tuple(ModelFile(p.name, p.stat().st_size, (k := classify(p.name))[0], format=k[1]) for p in paths)
    facts = summarize([File(f.name, f.size, f.role, f.format) for f in files], {p.name: p for p in paths})
    return PlanRequest("r1", "tiny", folder, files, facts, settings, 64 << 30, 1)


@pytest.fixture(scope="session")
def whisper_python() -> Path:
    """The Python of the engine's environment, installed once into the checkout's cache."""
    return asyncio.run(Environments(environments()).ensure("whisper", WHEELS, ignore))


class Served:
    """One server process and a client of it."""

    def __init__(self, python: Path, argv: tuple[str, ...], place: Path, env: dict[str, str]) -> None:
        self.log = place / "log"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(place / "notify.sock"))
        self._notify.settimeout(60)
        self.path = str(place / "engine.sock")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([str(python), *argv[1:]], stdout=log, stderr=log, env=os.environ | env)
        transport = httpx.HTTPTransport(uds=self.path)
        self.client = httpx.Client(transport=transport, base_url="http://engine", timeout=60)

    def wait(self) -> Served:
        """Until it says that it is ready."""
        assert self._notify.recv(100) == b"READY=1"
        return self

    def post(self, sound: bytes | None, task: str = "transcriptions", **fields: Any) -> httpx.Response:
        """A form as OpenAI's clients send it; lists become fields that are there several times."""
        files = {} if sound is None else {"file": ("sound.wav", sound, "audio/wav")}
        data = {"model": "tiny", **fields}
        return self.client.post(f"/v1/audio/{task}", data=data, files=files or {"none": b""})

    def text(self, sound: bytes, task: str = "transcriptions", **fields: Any) -> str:
        """What was heard."""
        response = self.post(sound, task, **fields)
        assert response.status_code == 200, response.text
        return response.json()["text"]

    def refused(self, sound: bytes | None, status: int = 400, task: str = "transcriptions", **fields: Any) -> Any:
        """The error."""
        response = self.post(sound, task, **fields)
        assert response.status_code == status, (response.status_code, response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def counted(self, name: str) -> float:
        """A figure of its metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition(" ")[0] == name)

    def close(self) -> int:
        self.client.close()
        self.process.terminate()
        code = self.process.wait(20)
        self._notify.close()
        return code


class Serve:
    """Starts the server that the engine plans for a folder; ``plan`` may have been made before."""

    def __init__(self, python: Path, stack: contextlib.ExitStack) -> None:
        self._python = python
        self._stack = stack

    def plan(self, folder: Path, **settings: Any) -> LaunchSpec:
        return make(Settings()).plan(request(folder, **settings)).spec

    def __call__(self, folder: Path, plan: LaunchSpec | None = None, **settings: Any) -> Served:
        place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="whisper-")))
        spec = plan or self.plan(folder, **settings)
        argv, env = expand(spec, Places("python", str(PROGRAMS), str(folder), str(place / "engine.sock")))
        served = Served(self._python, tuple(argv), place, dict(env))
        self._stack.callback(served.close)
        return served


@pytest.fixture(scope="session")
def starts(whisper_python: Path) -> Iterator[Serve]:
    """Starts servers; all of them end with the session."""
    with contextlib.ExitStack() as stack:
        yield Serve(whisper_python, stack)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small multilingual model."""
    return models.whisper(tmp_path_factory.mktemp("whisper") / "ggml-tiny.bin").parent


@pytest.fixture(scope="session")
def served(starts: Serve, folder: Path) -> Served:
    return starts(folder).wait()
