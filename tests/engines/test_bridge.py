"""An engine that only knows ports, behind the bridge: ready, relayed both ways, ended, and its failures told."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec, Readiness
from pierhead.engines.bridge import ENTRY, bridged
from pierhead.errors import EngineFailed
from pierhead.runtimes import sandbox
from pierhead.runtimes.process import ProcessRuntime
from pierhead.runtimes.readiness import wait_ready

# Not healthy until it was asked three times; echoes bodies; a stream that goes on until the other side ends.
ENGINE = """
import http.server, sys, time
asked = 0
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        global asked
        asked += 1
        self.send_response(200 if asked > 2 else 503); self.send_header("Content-Length", "0"); self.end_headers()
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def spec(*program: str, health: str = "/ready") -> LaunchSpec:
    return LaunchSpec(
        replica="bridge", model="m", engine="e", argv=bridged(*program, health=health), model_dir="/usr/share",
        entry=str(ENTRY), readiness=Readiness(health),
    )  # fmt: skip


@pytest.fixture(params=["bwrap", "plain"])
async def runtime(request: pytest.FixtureRequest) -> AsyncIterator[ProcessRuntime]:
    if request.param == "bwrap" and not sandbox.bwrap_works():
        pytest.skip("bubblewrap does not work here")
    with tempfile.TemporaryDirectory(prefix="bridge-", dir="/tmp") as name:
        yield ProcessRuntime(Path(name), RuntimeSettings(sandbox=request.param))


async def ask(socket: str, body: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(b"POST / HTTP/1.1\r\nHost: e\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    async with asyncio.timeout(20):
        said = await reader.read()
    writer.close()
    return said.partition(b"\r\n\r\n")[2]


async def test_it_is_ready_once_the_engine_is_healthy_and_relays_whole_bodies(runtime: Any) -> None:
    instance = await runtime.start(spec("$(PYTHON)", "-I", "-c", ENGINE, "$(PORT)"))
    try:
        await wait_ready(instance, timeout=20)
        bodies = [bytes([n]) * (n * 300_000) for n in range(1, 6)]
        assert await asyncio.gather(*(ask(instance.socket, body) for body in bodies)) == bodies
    finally:
        end = await instance.stop()
    assert end.code == 143, "the engine got the signal, and the bridge passed its end on"


async def test_an_engine_that_ends_gives_its_status_and_its_last_words(runtime: Any) -> None:
    code = "import sys; print('error: no such operator', file=sys.stderr); sys.exit(3)"
    instance = await runtime.start(spec("$(PYTHON)", "-I", "-c", code))
    try:
        with pytest.raises(EngineFailed, match="status 3: error: no such operator"):
            await wait_ready(instance, timeout=20)
    finally:
        await instance.stop()


async def test_a_program_that_is_not_there_is_named(runtime: Any) -> None:
    instance = await runtime.start(spec("/no/such/program"))
    try:
        with pytest.raises(EngineFailed, match="/no/such/program cannot be started"):
            await wait_ready(instance, timeout=20)
    finally:
        await instance.stop()


async def test_a_client_that_goes_away_takes_no_other_with_it(runtime: Any) -> None:
    instance = await runtime.start(spec("$(PYTHON)", "-I", "-c", ENGINE, "$(PORT)"))
    try:
        await wait_ready(instance, timeout=20)
        for _ in range(20):
            _, writer = await asyncio.open_unix_connection(instance.socket)
            writer.write(b"POST / HTTP/1.1\r\nHost: e\r\nContent-Length: 99\r\n\r\nhalf")
            writer.transport.abort()
        assert await ask(instance.socket, b"still here") == b"still here"
    finally:
        await instance.stop()


def test_it_needs_nothing_but_the_standard_library() -> None:
    assert "pierhead" not in ENTRY.read_text(encoding="utf-8").replace("Pierhead", "")
    assert sys.version_info >= (3, 11)
