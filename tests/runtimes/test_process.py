"""The process runtime with the real model: what its engines can reach, how they end and what outlives whom."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec, Limits, PlanRequest
from pierhead.engines.llamacpp import LlamaCpp
from pierhead.errors import EngineFailed
from pierhead.formats.gguf import read_file, summary
from pierhead.runtimes import sandbox, shim
from pierhead.runtimes.cgroup import ROOT, Cgroup
from pierhead.runtimes.family import below
from pierhead.runtimes.process import ProcessInstance, ProcessRuntime
from pierhead.runtimes.readiness import wait_ready
from pierhead.sockets import connect_unix
from pierhead.store.model import ModelFile

BOTH = pytest.mark.parametrize("kind", ["bwrap", "plain"])


@pytest.fixture(autouse=True)
def _needs_bwrap(request: pytest.FixtureRequest) -> None:
    call = getattr(request.node, "callspec", None)
    if (call is None or call.params.get("kind") == "bwrap") and not sandbox.bwrap_works():
        pytest.skip("bubblewrap does not work here")


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="runtimes-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def replica(root: Path) -> str:
    return "t" + root.name[-8:].lower().replace("_", "0")


@pytest.fixture
async def started() -> AsyncIterator[list[ProcessInstance]]:
    """What to stop at the end."""
    found: list[ProcessInstance] = []
    yield found
    for instance in found:
        await instance.stop(1)


def runtime(root: Path, kind: str) -> ProcessRuntime:
    return ProcessRuntime(root, RuntimeSettings(sandbox=kind))


def real(model: Path, replica: str) -> LaunchSpec:
    files = (ModelFile(model.name, model.stat().st_size),)
    request = PlanRequest(replica, "smollm2", model.parent, files, summary(read_file(model)), {"context": 512}, 4 << 30)
    return LlamaCpp().plan(request).spec


def script(code: str, replica: str, root: Path, **more: Any) -> LaunchSpec:
    return LaunchSpec(
        replica=replica, model="m", engine="test", argv=("$(PYTHON)", "-uc", code), model_dir=str(root), **more
    )


def probe(code: str) -> tuple[str, ...]:
    return ("/usr/bin/python3", "-c", f"import os, json\nprint(json.dumps({code}))")


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}


def groups(replica: str) -> list[Path]:
    return list(ROOT.glob(f"*/pierhead/{replica}")) + list(ROOT.glob(f"pierhead/{replica}"))


def request(path: str, target: str, body: Any = None) -> tuple[int, bytes]:
    raw = b"" if body is None else json.dumps(body).encode()
    with connect_unix(path, 30) as sock:
        head = f"{'POST' if raw else 'GET'} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        sock.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        got = b"".join(iter(lambda: sock.recv(65536), b""))
    return int(got.split()[1]), got.partition(b"\r\n\r\n")[2]


async def first_line(instance: ProcessInstance) -> bytes:
    async with asyncio.timeout(20):
        async for line in instance.logs(follow=True):
            return line
    raise AssertionError(await instance.wait())


@BOTH
async def test_the_real_engine_answers_and_leaves_nothing_behind(
    kind: str, root: Path, replica: str, smollm2: Path, started: list[ProcessInstance]
) -> None:
    place = runtime(root, kind)
    instance = await place.start(real(smollm2, replica))
    started.append(instance)
    await wait_ready(instance, timeout=60)
    assert request(instance.socket, "/health")[0] == 200
    code, body = request(instance.socket, "/v1/completions", {"prompt": "One two", "max_tokens": 4})
    assert code == 200
    assert json.loads(body)["usage"]["completion_tokens"] > 0
    stats = await instance.stats()
    assert stats.memory > 50 << 20
    assert stats.pids > 0
    family = [psutil.Process(instance.shim), *psutil.Process(instance.shim).children(recursive=True)]
    assert await place.list() == [replica]
    end = await instance.stop()
    assert (end.code, end.signal) == (0, 0), "SIGTERM must reach the engine itself"
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert os.listdir(root) == []
    assert groups(replica) == []


async def test_an_engine_in_the_sandbox_reaches_nothing(
    root: Path, replica: str, smollm2: Path, started: list[ProcessInstance]
) -> None:
    instance = await runtime(root, "bwrap").start(real(smollm2, replica))
    started.append(instance)
    await wait_ready(instance, timeout=60)

    async def ask(code: str) -> Any:
        got = await instance.exec(probe(code))
        assert got.code == 0, got.stderr
        return json.loads(got.stdout)

    devices = await ask("[x.split(':')[0].strip() for x in open('/proc/net/dev') if ':' in x]")
    assert set(devices) <= {"lo"}
    hidden = ["/home", str(root), str(Path.home() / ".ssh"), "/etc/shadow", "/var"]
    assert await ask(f"[p for p in {hidden} if os.path.exists(p)]") == []
    assert await ask("[os.access(p, os.W_OK) for p in ('/', '/model', '/usr', '/engine', '/etc')]") == [False] * 5
    assert await ask("os.getuid()") == sandbox.UID
    mounted = {Path(p).parts[2] for p in (sys.prefix, sys.base_prefix) if p.startswith("/tmp/")}
    assert set(await ask("os.listdir('/tmp')")) == mounted  # Python itself may live there, nothing else
    assert await ask("(lambda s: s.f_blocks * s.f_frsize)(os.statvfs('/tmp'))") == sandbox.TMP_SIZE
    assert await ask("[k for k in os.environ if k not in ('PATH', 'LANG', 'LC_CTYPE')]") == []
    engine = status(psutil.Process(instance.shim).children(recursive=True)[-1].pid)
    assert engine["NoNewPrivs"] == "1"
    assert {engine[k].strip("0") for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}


@BOTH
async def test_a_corrupt_model_fails_with_the_last_lines_of_the_log(
    kind: str, root: Path, replica: str, smollm2: Path, started: list[ProcessInstance]
) -> None:
    spec = real(smollm2, replica)
    folder = root / "model"
    folder.mkdir()
    with smollm2.open("rb") as file:
        (folder / smollm2.name).write_bytes(file.read(1 << 16))
    instance = await runtime(root / "r", kind).start(msgspec.structs.replace(spec, model_dir=str(folder)))
    started.append(instance)
    with pytest.raises(EngineFailed) as caught:
        await wait_ready(instance, timeout=60)
    assert any("load" in line for line in caught.value.data["log"])


@BOTH
async def test_killing_the_shim_takes_the_engine_with_it(
    kind: str, root: Path, replica: str, started: list[ProcessInstance]
) -> None:
    code = "import signal; signal.signal(15, signal.SIG_IGN); print('up'); signal.pause()"
    instance = await runtime(root, kind).start(script(code, replica, root))
    started.append(instance)
    await first_line(instance)
    fds = [os.pidfd_open(p.pid) for p in psutil.Process(instance.shim).children(recursive=True)]
    os.kill(instance.shim, signal.SIGKILL)
    async with asyncio.timeout(10):
        end = await instance.wait()
    assert end.signal == signal.SIGKILL
    assert "shim" in end.reason
    await instance.stop()
    assert fds
    for fd in fds:
        assert select.select([fd], [], [], 0)[0], "it still runs"
        os.close(fd)
    assert groups(replica) == []


DAEMON = """
import asyncio, sys, msgspec
from pathlib import Path
from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec
from pierhead.runtimes.process import ProcessRuntime
async def main():
    spec = msgspec.json.decode(sys.argv[3], type=LaunchSpec)
    instance = await ProcessRuntime(Path(sys.argv[1]), RuntimeSettings(sandbox=sys.argv[2])).start(spec)
    async for line in instance.logs(follow=True):
        print("up", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@BOTH
async def test_an_engine_outlives_a_killed_daemon_and_is_adopted(
    kind: str, root: Path, replica: str, started: list[ProcessInstance]
) -> None:
    spec = msgspec.json.encode(script("import signal; print('up'); signal.pause()", replica, root)).decode()
    with subprocess.Popen([sys.executable, "-c", DAEMON, str(root), kind, spec], stdout=subprocess.PIPE) as daemon:  # noqa: ASYNC220
        assert daemon.stdout is not None
        assert await asyncio.to_thread(daemon.stdout.readline) == b"up\n"
        daemon.kill()
    place = runtime(root, kind)
    assert await place.list() == [replica]
    instance = await place.adopt(replica)
    assert instance is not None
    started.append(instance)
    assert instance.pid is not None
    assert [line async for line in instance.logs()] == [b"up\n"]
    end = await instance.stop()
    assert end.signal == signal.SIGTERM
    assert await place.adopt(replica) is None


@pytest.mark.parametrize("lie", [{"start": 1}, {"boot": "another"}, {"pid": 2**40}, {"pid": "x"}])
async def test_a_recycled_pid_is_not_adopted_but_put_away(lie: dict[str, Any], root: Path, replica: str) -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as other:  # noqa: ASYNC220
        folder = root / replica
        folder.mkdir()
        (folder / "run.json").write_text("{}")
        (folder / "spec.json").write_bytes(msgspec.json.encode(script("", replica, root)))
        state = {"boot": shim.boot(), "pid": other.pid, "start": shim.started(other.pid), "engine": 1} | lie
        (folder / "shim.json").write_text(json.dumps(state))
        place = runtime(root, "plain")
        assert await place.adopt(replica) is None
        assert await place.list() == []
        assert other.poll() is None, "somebody else's process was touched"


@BOTH
async def test_stop_kills_what_ignores_sigterm(
    kind: str, root: Path, replica: str, started: list[ProcessInstance]
) -> None:
    code = "import signal\nsignal.signal(15, lambda *_: print('no'))\nprint('up')\nwhile True: signal.pause()"
    instance = await runtime(root, kind).start(script(code, replica, root))
    started.append(instance)
    await first_line(instance)
    end = await instance.stop(0.2)
    assert end.signal == signal.SIGKILL
    assert os.listdir(root) == []
    assert groups(replica) == []


async def test_the_log_is_rotated_read_by_its_tail_and_followed_to_the_end(
    root: Path, replica: str, started: list[ProcessInstance]
) -> None:
    code = "for i in range(6000): print(f'{i:06} ' + 'x' * 1000)\nprint('last', end='')"
    instance = await runtime(root, "plain").start(script(code, replica, root))
    started.append(instance)
    async with asyncio.timeout(20):
        seen = [line[:6] async for line in instance.logs(follow=True)]
    assert seen[-1] == b"last\n"
    assert seen[:-1] == sorted(seen[:-1])
    assert (instance.folder / "log.1").stat().st_size < shim.LOG_LIMIT + (1 << 17)
    assert [line[:6] async for line in instance.logs(tail=2)] == [b"005999", b"last\n"]


@BOTH
async def test_an_engine_that_eats_memory_is_killed_for_it(
    kind: str, root: Path, replica: str, started: list[ProcessInstance]
) -> None:
    if "memory" not in Cgroup("probe").possible():
        pytest.skip("no memory control group can be made here")
    spec = script("x = bytearray(256 << 20)\nprint(len(x))", replica, root, limits=Limits(memory=64 << 20))
    instance = await runtime(root, kind).start(spec)
    started.append(instance)
    async with asyncio.timeout(30):
        end = await instance.wait()
    assert end.oom
    assert end.signal == signal.SIGKILL


@BOTH
async def test_the_number_of_processes_is_bounded(
    kind: str, root: Path, replica: str, started: list[ProcessInstance]
) -> None:
    if "pids" not in Cgroup("probe").possible():
        pytest.skip("no control group for processes can be made here")
    code = (
        "import os, signal\nn = 0\ntry:\n  while n < 100:\n    if os.fork() == 0: signal.pause()\n    n += 1\n"
        "except BlockingIOError: pass\nprint(n)\nsignal.pause()"
    )
    instance = await runtime(root, kind).start(script(code, replica, root, limits=Limits(pids=20)))
    started.append(instance)
    assert 0 < int(await first_line(instance)) < 20


async def test_a_link_in_place_of_the_socket_is_refused(root: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "real.sock"))
        server.listen()
        (root / "engine.sock").symlink_to(root / "real.sock")
        with pytest.raises(OSError, match=r"symbolic|not a socket"):
            connect_unix(root / "engine.sock", 1)


@BOTH
async def test_output_of_exec_is_bounded(kind: str, root: Path, replica: str, started: list[ProcessInstance]) -> None:
    instance = await runtime(root, kind).start(script("import signal; print('up'); signal.pause()", replica, root))
    started.append(instance)
    await first_line(instance)
    got = await instance.exec(("/usr/bin/python3", "-c", "print('x' * (4 << 20))"))
    assert (got.code, len(got.stdout)) == (0, 1 << 20)


def test_the_family_of_a_process_is_found_down_to_the_last() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1) as outer:
        assert outer.stdout is not None
        assert outer.stdout.readline() == b"1\n"
        assert [p.cmdline()[-1][:8] for p in below(outer.pid)] == ["print(1,"]
        outer.communicate()
        assert below(outer.pid) == []
