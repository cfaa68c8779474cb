"""Pushes go on where they stopped, after a kill too, and get along with registries that want it their own way."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pexpect
import pytest
from aiohttp import web

from pierhead import events
from pierhead.config import SourceSettings
from pierhead.errors import SourceUnavailable
from pierhead.paths import Paths
from pierhead.refs import parse
from pierhead.registry import push
from pierhead.registry.client import Registry
from pierhead.registry.credentials import Login
from pierhead.registry.name import image_name
from pierhead.registry.publish import push_model
from pierhead.registry.push import push_blob
from pierhead.registry.uploads import Uploads
from pierhead.registry.wire import Retry
from pierhead.sources.pull import pull
from pierhead.store.layout import Store

from ..sources.servers import make_gguf  # noqa: TID252
from .conftest import StartRegistry
from .doubles import break_off

pytestmark = pytest.mark.timeout(60)
FAST = Retry(attempts=5, first=0.001, most=0.002)
MIB = 1 << 20
DATA = random.Random(11).randbytes(8 * MIB)
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()


class Taker:
    """A registry that takes one blob by the standard's words, and less or more of it as it is told."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.blob = b""
        self.number = 0  # of the upload; earlier ones are forgotten
        self.received = 0  # bytes of bodies
        self.requests: list[tuple[str, str]] = []
        self.least = 0
        self.most = 1 << 60  # bytes of one request that a proxy lets pass
        self.patches = True
        self.cut: list[int] = []  # break off after so many bytes, one per long request
        self.lost_ends = 0  # answers to the end that do not arrive
        self.host = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        match request.method:
            case "HEAD":
                return web.Response(status=200 if self.blob else 404)
            case "POST":
                self.number += 1
                self.got.clear()
                return self._where(202, **({"OCI-Chunk-Min-Length": str(self.least)} if self.least else {}))
            case _ if not request.path.endswith(f"/{self.number}"):
                return web.Response(status=404)
            case "GET":
                return self._where(204, Range=f"0-{max(0, len(self.got) - 1)}")
            case _ if (request.content_length or 0) > self.most:
                return web.Response(status=413)
            case "PATCH":
                return await self._patch(request)
            case _:
                return await self._put(request)

    async def _patch(self, request: web.Request) -> web.Response:
        if not self.patches:
            return web.Response(status=405)
        start = int(request.headers["Content-Range"].partition("-")[0])
        if start != len(self.got):
            return web.Response(status=416)
        await self._take(request)
        return self._where(202, Range=f"0-{len(self.got) - 1}")

    async def _put(self, request: web.Request) -> web.Response:
        await self._take(request)
        if "sha256:" + hashlib.sha256(self.got).hexdigest() != request.query["digest"]:
            return web.Response(status=400, text='{"errors":[{"code":"DIGEST_INVALID"}]}')
        self.blob = bytes(self.got)
        if self.lost_ends:
            self.lost_ends -= 1
            break_off(request)
        return web.Response(status=201)

    async def _take(self, request: web.Request) -> None:
        cut = self.cut.pop(0) if self.cut and request.content_length else None
        taken = 0
        async for chunk in request.content.iter_any():
            part = chunk if cut is None else chunk[: cut - taken]
            taken += len(part)
            self.received += len(part)
            self.got += part
            if cut is not None and taken >= cut:
                break_off(request)
                return

    def _where(self, status: int, **headers: str) -> web.Response:
        return web.Response(status=status, headers={"Location": f"/v2/a/b/blobs/uploads/{self.number}", **headers})


@pytest.fixture
async def taker() -> AsyncGenerator[Taker]:
    found = Taker()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{rest:.*}", found.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.host = f"127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "CHUNK", 2 * MIB)


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    file = tmp_path / "blob"
    file.write_bytes(DATA)
    return file


async def send(host: str, blob: Path, *, uploads: Uploads | None = None, retry: Retry = FAST) -> int:
    name = image_name(parse(f"oci://{host}/a/b:v1"))
    async with Registry(name, SourceSettings(read_timeout=10), Login(), retry=retry) as registry:
        return await push_blob(registry, DIGEST, blob, len(DATA), lambda done: None, uploads=uploads)


async def test_chunks_that_break_off_go_on_where_the_registry_is(taker: Taker, blob: Path) -> None:
    taker.cut = [MIB, 100_000, 1]
    assert await send(taker.host, blob) >= len(DATA)
    assert taker.blob == DATA
    assert taker.received == len(DATA), "nothing was taken twice"
    assert await send(taker.host, blob) == 0


async def test_a_registry_that_is_elsewhere_is_asked_where(taker: Taker, blob: Path) -> None:
    taken: list[bool] = []
    original = taker._patch

    async def patch(request: web.Request) -> web.Response:
        if len(taken) == 1:  # it lost the end of the first chunk
            del taker.got[-5_000:]
        taken.append(True)
        return await original(request)

    taker._patch = patch  # type: ignore[method-assign]
    await send(taker.host, blob)
    assert taker.blob == DATA
    assert taker.received == len(DATA) + 5_000


async def test_chunks_are_as_long_as_the_registry_wants_them(taker: Taker, blob: Path) -> None:
    taker.least = 5 * MIB
    await send(taker.host, blob)
    assert taker.blob == DATA
    assert sum(method == "PATCH" for method, _ in taker.requests) == 2


async def test_a_registry_without_chunks_gets_the_blob_in_one_piece(taker: Taker, blob: Path) -> None:
    taker.patches, taker.cut = False, [0, 3 * MIB]
    await send(taker.host, blob)
    assert taker.blob == DATA
    assert sum(method == "PATCH" for method, _ in taker.requests) == 1


async def test_a_proxy_that_lets_little_pass_gets_little_at_once(taker: Taker, blob: Path) -> None:
    taker.most = MIB
    await send(taker.host, blob)
    assert taker.blob == DATA
    taker.blob, taker.most = b"", 1000
    with pytest.raises(SourceUnavailable, match="413") as caught:
        await send(taker.host, blob)
    assert "client_max_body_size" in (caught.value.hint or "")


async def test_a_lost_answer_to_the_end_sends_nothing_again(taker: Taker, blob: Path) -> None:
    taker.lost_ends = 1
    assert await send(taker.host, blob) == len(DATA)
    assert taker.received == len(DATA)


async def test_a_forgotten_upload_begins_anew(taker: Taker, blob: Path, tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads")
    taker.cut = [MIB] * 5
    once = Retry(attempts=1)
    with pytest.raises(SourceUnavailable):
        await send(taker.host, blob, uploads=uploads, retry=once)
    assert list((tmp_path / "uploads").glob("*.json"))
    taker.cut.clear()
    taker.number = 77
    assert await send(taker.host, blob, uploads=uploads) == len(DATA)
    assert taker.blob == DATA
    assert not list((tmp_path / "uploads").glob("*.json"))


async def test_a_remembered_upload_belongs_to_its_registry(taker: Taker, blob: Path, tmp_path: Path) -> None:
    """What lies in the folder is damaged, or of another registry: it is passed over."""
    uploads = Uploads(tmp_path / "uploads")
    taker.cut = [MIB]
    with pytest.raises(SourceUnavailable):
        await send(taker.host, blob, uploads=uploads, retry=Retry(attempts=1))
    (record,) = (tmp_path / "uploads").glob("*.json")
    assert record.stat().st_mode & 0o777 == 0o600
    good = json.loads(record.read_text())
    for bad in ("{", "[]", json.dumps({**good, "base": "http://other.example"}), json.dumps({**good, "location": "x"})):
        record.write_text(bad)
        taker.blob = b""
        await send(taker.host, blob, uploads=uploads)
        assert taker.blob == DATA


async def test_two_pushes_of_one_blob_do_not_share_an_upload(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads")
    with uploads.held("http://x", "a", DIGEST) as first, uploads.held("http://x", "a", DIGEST) as second:
        first.remember("http://x/1")
        second.remember("http://x/2")
        assert (first.location(), second.location()) == ("http://x/1", "")


# --- a real registry --------------------------------------------------------------------------------------------------

CHILD = """
import asyncio, hashlib, os, signal, sys
from pathlib import Path
from pierhead.config import SourceSettings
from pierhead.refs import parse
from pierhead.registry import push
from pierhead.registry.client import Registry
from pierhead.registry.credentials import Login
from pierhead.registry.name import image_name
from pierhead.registry.uploads import Uploads

host, file, digest, folder, steps = sys.argv[1:]
push.CHUNK = 2 << 20
left = int(steps)

def step(name):
    global left
    if left <= 0:
        return
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

read = push._Sending._read

async def broken(self, *what):
    global left
    async for block in read(self, *what):
        yield block
        left += 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

if left < 0:
    push._Sending._read = broken

async def main():
    name = image_name(parse(f"oci://{host}/a/b:v1"))
    path = Path(file)
    async with Registry(name, SourceSettings(), Login()) as registry:
        size = path.stat().st_size
        print(await push.push_blob(registry, digest, path, size, lambda d: None, uploads=Uploads(Path(folder), step)))

asyncio.run(main())
"""


def killed(host: str, blob: Path, folder: Path, step: int) -> subprocess.CompletedProcess[str]:
    """A push that is killed when it has remembered its upload for the ``step``th time (0: not at all).

    Below zero it is killed within a chunk, when it has sent so many MiB.
    """
    argv = [sys.executable, "-c", CHILD, host, str(blob), DIGEST, str(folder), str(step)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_killed_push_goes_on_where_it_was(
    start_registry: StartRegistry, blob: Path, tmp_path: Path, step: int
) -> None:
    """With four chunks of 2 MiB: after the upload was begun, and after each chunk."""
    host, folder = start_registry(), tmp_path / "uploads"
    assert killed(host, blob, folder, step).returncode == -signal.SIGKILL
    done = killed(host, blob, folder, 0)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(DATA) - (step - 1) * 2 * MIB, "only what was missing is sent"
    assert killed(host, blob, folder, 0).stdout == "0\n", "the registry has it, whole"
    assert not list(folder.glob("*.json"))


def test_a_push_killed_within_a_chunk_ends_right(start_registry: StartRegistry, blob: Path, tmp_path: Path) -> None:
    """This registry forgets an upload whose chunk broke off; the next push notices and begins anew."""
    host, folder = start_registry(), tmp_path / "uploads"
    assert killed(host, blob, folder, -3).returncode == -signal.SIGKILL
    done = killed(host, blob, folder, 0)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in (len(DATA), len(DATA) - 2 * MIB)
    assert killed(host, blob, folder, 0).stdout == "0\n"


async def test_a_push_tells_how_far_it_is(start_registry: StartRegistry, home: Paths, tmp_path: Path) -> None:
    host, store = start_registry(), Store.open(home.store)
    file = tmp_path / "m.gguf"
    file.write_bytes(make_gguf(3 * MIB))
    await pull(str(file), store=store, settings=SourceSettings(), paths=home, name="mine")
    heard: list[events.AnyEvent] = []
    place = image_name(parse(f"oci://{host}/a/b:v1"))
    await push_model(store, "mine", place, settings=SourceSettings(), env={}, listener=heard.append)
    assert isinstance(heard[0], events.PushPlanned)
    assert isinstance(heard[-1], events.PushDone)
    for name in {e.file for e in heard if isinstance(e, events.PushProgress)}:
        told = [(e.done, e.total, e.resumed) for e in heard if isinstance(e, events.PushProgress) and e.file == name]
        assert told[0][0] == 0
        assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
        assert told[-1][0] == told[-1][1]
    heard.clear()
    await push_model(store, "mine", place, settings=SourceSettings(), env={}, listener=heard.append)
    assert all(e.resumed == e.total for e in heard if isinstance(e, events.PushProgress))


def test_a_terminal_shows_a_push_and_a_pipe_gets_lines(start_registry: StartRegistry, tmp_path: Path) -> None:
    env = {**os.environ, "PIERHEAD_HOME": str(tmp_path / "home"), "DOCKER_CONFIG": str(tmp_path), "TERM": "xterm"}
    pier = str(Path(sys.executable).parent / "pier")
    (tmp_path / "m.gguf").write_bytes(make_gguf(3 * MIB))
    subprocess.run([pier, "pull", str(tmp_path / "m.gguf"), "--name", "mine"], env=env, check=True, capture_output=True)
    where = f"{start_registry()}/team/model"
    child = pexpect.spawn(pier, ["push", "mine", f"{where}:1"], env=env, timeout=30, dimensions=(24, 100))
    child.expect("Pushing mine to")
    child.expect("Pushed .*, 3.* sent")
    child.expect("sha256:[0-9a-f]{64}")
    child.expect(pexpect.EOF)
    piped = subprocess.run([pier, "push", "mine", f"{where}:2"], env=env, check=True, capture_output=True, text=True)
    assert piped.stderr.splitlines()[0].startswith("Pushing mine to")
    assert "The registry had everything" in piped.stderr
