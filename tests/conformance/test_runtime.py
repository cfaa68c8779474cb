"""One suite for every Runtime: what the fleet relies on, with a tiny program as the engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec
from pierhead.errors import EngineFailed
from pierhead.events import ignore
from pierhead.runtimes import sandbox
from pierhead.runtimes.memory import MemoryRuntime
from pierhead.runtimes.process import ProcessRuntime
from pierhead.runtimes.readiness import healthy, wait_ready

IMAGE = os.environ.get("PIERHEAD_TEST_IMAGE", "")  # any with Python, for the Docker runtime
ENGINE = """
import http.server, os, signal, socket, socketserver, sys
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"ok")
    def address_string(self): return "gateway"
    def log_message(self, *_): pass
print("up", flush=True)
socketserver.BaseServer.handle_error = lambda *_: None  # a probe that goes away early is no news
server = socketserver.ThreadingUnixStreamServer(sys.argv[1], Handler)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
    try: out.sendto(b"READY=1", os.path.join(os.path.dirname(sys.argv[1]), "notify.sock"))
    except OSError: pass
server.serve_forever()
"""


@pytest.fixture(params=["bwrap", "plain", "memory", "docker"])
async def runtime(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    kind = request.param
    if kind == "bwrap" and not sandbox.bwrap_works():
        pytest.skip("bubblewrap does not work here")
    if kind == "docker":
        pytest.importorskip("pierhead.runtimes.docker", reason="there is no Docker runtime")
        if not os.environ.get("PIERHEAD_TEST_DOCKER"):
            pytest.skip("PIERHEAD_TEST_DOCKER names no Docker Engine")
        if not os.environ.get("PIERHEAD_TEST_IMAGE"):
            pytest.skip("PIERHEAD_TEST_IMAGE names no image with Python on that Docker Engine")
    with tempfile.TemporaryDirectory(prefix="conform-", dir="/tmp") as name:
        root = Path(name)
        made: Any
        if kind == "docker":
            from pierhead.runtimes.docker import DockerRuntime

            made = DockerRuntime(root, RuntimeSettings(docker_host=os.environ["PIERHEAD_TEST_DOCKER"]))
        else:
            made = MemoryRuntime(root) if kind == "memory" else ProcessRuntime(root, RuntimeSettings(sandbox=kind))
        yield made
        for replica in await made.list():
            left = await made.adopt(replica)
            if left is not None:
                await left.stop(1)
        if kind == "docker":
            await made.close()


@pytest.fixture
def spec() -> LaunchSpec:
    argv = ("$(PYTHON)", "-c", ENGINE, "$(SOCKET)")
    return LaunchSpec(replica="conform", model="m", engine="test", argv=argv, model_dir="/usr/share", image_name=IMAGE)


@pytest.fixture
async def instance(runtime: Any, spec: LaunchSpec) -> Any:
    found = await runtime.start(await runtime.prepare(spec, ignore))
    await wait_ready(found, timeout=20)
    return found


async def test_capabilities_name_the_runtime(runtime: Any) -> None:
    can = await runtime.capabilities()
    assert can.available
    assert can.name


async def test_it_answers_on_its_socket_is_listed_and_stops_without_a_trace(runtime: Any, instance: Any) -> None:
    assert await healthy(instance.socket)
    assert await runtime.list() == ["conform"]
    await instance.stop()
    assert not await healthy(instance.socket)
    assert await runtime.list() == []
    assert await runtime.adopt("conform") is None


async def test_every_wait_gets_the_same_end_and_stop_can_be_repeated(instance: Any) -> None:
    waits = [asyncio.ensure_future(instance.wait()) for _ in range(3)]
    end = await instance.stop()
    assert await asyncio.gather(*waits) == [end] * 3
    assert await instance.wait() == end
    assert await instance.stop() == end


async def test_a_cancelled_wait_harms_no_other(instance: Any) -> None:
    first, second = asyncio.ensure_future(instance.wait()), asyncio.ensure_future(instance.wait())
    first.cancel()
    await asyncio.wait((first,))
    end = await instance.stop()
    assert await second == end


async def test_logs_are_whole_lines_and_following_ends_with_the_engine(instance: Any) -> None:
    async def follow() -> list[bytes]:
        return [line async for line in instance.logs(follow=True)]

    async with asyncio.timeout(20), contextlib.aclosing(instance.logs(follow=True)) as lines:
        await anext(lines)  # what an engine says may reach its log a little after it is ready
    assert [line async for line in instance.logs(tail=1)] == [b"up\n"]
    following = asyncio.ensure_future(follow())
    await asyncio.wait((following,), timeout=0)
    await instance.stop()
    async with asyncio.timeout(10):
        assert (await following)[:1] in ([b"up\n"], [])


async def test_figures_are_there_while_it_runs(instance: Any) -> None:
    stats = await instance.stats()
    assert stats.memory > 0
    assert stats.pids > 0
    await instance.stop()


async def test_what_runs_can_be_adopted_and_stopped(runtime: Any, instance: Any) -> None:
    again = await runtime.adopt("conform")
    assert again is not None
    assert again.spec.model == instance.spec.model
    assert again.socket == instance.socket
    await again.stop()
    async with asyncio.timeout(10):
        await instance.wait()


async def test_nothing_can_be_run_in_what_has_ended(instance: Any) -> None:
    assert (await instance.exec(("/bin/true",))).code == 0
    await instance.stop()
    with pytest.raises(EngineFailed):
        await instance.exec(("/bin/true",))


async def test_an_unknown_replica_is_not_adopted(runtime: Any) -> None:
    assert await runtime.adopt("nobody") is None
