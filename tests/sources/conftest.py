"""Fixtures of the sources' tests."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import pytest

from pierhead.config import SourceSettings
from pierhead.paths import Paths
from pierhead.store.layout import Store

from .servers import CHILD, Child, FakeHub, FakeIndex, FakeScope, Puller, Server, serving


@pytest.fixture
async def server() -> AsyncGenerator[Server]:
    async with serving() as found:
        yield found


@pytest.fixture
async def cdn() -> AsyncGenerator[Server]:
    """A second server: where a hub keeps its large files."""
    async with serving() as found:
        yield found


@pytest.fixture
def hub(server: Server, cdn: Server) -> FakeHub:
    return FakeHub(server, cdn)


@pytest.fixture
def scope(server: Server, cdn: Server) -> FakeScope:
    return FakeScope(server, cdn)


@pytest.fixture
def index(server: Server) -> FakeIndex:
    return FakeIndex(server)


@pytest.fixture
def puller(home: Paths, tmp_path: Path, server: Server) -> Puller:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {
        "PATH": path,
        "HOME": str(tmp_path),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "UV_DEFAULT_INDEX": f"{server.url}/simple/",
        "UV_HTTP_TIMEOUT": "10",
        "PIP_INDEX_URL": f"{server.url}/simple/",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_CACHE_DIR": str(tmp_path / "pip"),
    }
    settings = SourceSettings(hf_endpoint=server.url, ms_endpoint=server.url, connect_timeout=5, read_timeout=5)
    return Puller(home, settings, env, Store.open(home.store))


@pytest.fixture
async def spawn(puller: Puller, tmp_path: Path) -> AsyncGenerator[Callable[..., Awaitable[Child]]]:
    import msgspec

    started: list[Child] = []

    async def start(reference: str, **env: str) -> Child:
        full = {
            **puller.env,
            "PIERHEAD_HOME": str(tmp_path / "home"),
            "CHILD_SETTINGS": msgspec.json.encode(puller.settings).decode(),
            **env,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHILD, reference, stdout=asyncio.subprocess.PIPE, env=full
        )
        started.append(Child(process))
        return started[-1]

    yield start
    for child in started:
        if child.process.returncode is None:
            await child.kill()
        transport = child.process._transport  # type: ignore[attr-defined]
        transport.close()


@pytest.fixture
def unused() -> int:
    """A port that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
