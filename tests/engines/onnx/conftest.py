"""Real servers of the ONNX engine, in the environment that the process runtime would make for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
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
from pierhead.engines.onnx import Onnx, make
from pierhead.engines.serving import PROGRAMS
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
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    kinds = {name: classify(name) for name in names}
    files = tuple(ModelFile(name, (folder / name).stat().st_size, *_kind(kinds[name])) for name in names)
    facts = summarize([File(f.name, f.size, f.role, f.format) for f in files], {name: folder / name for name in names})
    return PlanRequest("r1", "tiny", folder, files, facts, settings, 64 << 30, 1)


def _kind(found: tuple[Any, str]) -> tuple[Any, str, str]:
    return found[0], "", found[1]


@pytest.fixture(scope="session")
def onnx_python() -> Path:
    """The Python of the engine's environment, installed once into the checkout's cache."""
    spec = Onnx().plan(sample()).spec
    assert spec.environment is not None
    return asyncio.run(Environments(environments()).ensure("onnx", spec.environment, ignore))


def sample() -> PlanRequest:
    """A model that is not on disk."""
    facts = {"weights_bytes": 1, "inputs": [{"name": "x"}], "outputs": [{"name": "y"}]}
    return PlanRequest("r1", "m", Path("/m"), (ModelFile("model.onnx", 1, "weights", format="onnx"),), facts)


class Served:
    """One server process and a client of it."""

    def __init__(self, python: Path, folder: Path, argv: tuple[str, ...], place: Path) -> None:
        self.log = place / "log"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(place / "notify.sock"))
        self._notify.settimeout(60)
        path = str(place / "engine.sock")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([str(python), *argv[1:]], stdout=log, stderr=log)
        self.client = httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://engine", timeout=30)
        self.path = path

    def wait(self) -> Served:
        """Until it says that it is ready."""
        assert self._notify.recv(100) == b"READY=1"
        return self

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(path, content=data, headers=headers)

    def ask(self, path: str, body: Any) -> Any:
        """The answer, which must be a good one."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path: str, body: Any, status: int = 400, **headers: str) -> str:
        """Why it is refused."""
        response = self.post(path, body, **headers)
        assert response.status_code == status, (response.status_code, response.text)
        error = response.json()["error"]
        return error if isinstance(error, str) else error["message"]

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
        place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="onnx-")))
        spec = plan or self.plan(folder, **settings)
        argv, _ = expand(spec, Places("python", str(PROGRAMS), str(folder), str(place / "engine.sock")))
        served = Served(self._python, folder, tuple(argv), place)
        self._stack.callback(served.close)
        return served


@pytest.fixture(scope="session")
def starts(onnx_python: Path) -> Iterator[Serve]:
    """Starts servers; all of them end with the session."""
    with contextlib.ExitStack() as stack:
        yield Serve(onnx_python, stack)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx-models")


@pytest.fixture(scope="session")
def classifier(starts: Serve, shelf: Path) -> Served:
    return starts(models.classifier(shelf / "classifier")).wait()


@pytest.fixture(scope="session")
def tagger(starts: Serve, shelf: Path) -> Served:
    return starts(models.tagger(shelf / "tagger")).wait()


@pytest.fixture(scope="session")
def embedder(starts: Serve, shelf: Path) -> Served:
    return starts(models.embedder(shelf / "embedder")).wait()


@pytest.fixture(scope="session")
def ranker(starts: Serve, shelf: Path) -> Served:
    return starts(models.ranker(shelf / "ranker")).wait()


@pytest.fixture(scope="session")
def doubler(starts: Serve, shelf: Path) -> Served:
    return starts(models.doubler(shelf / "doubler")).wait()
