"""Looks around from inside real containers: every restriction is tried, not read from a configuration."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec
from pierhead.engines.serving import ENV
from pierhead.events import ignore
from pierhead.runtimes.docker import DockerRuntime
from pierhead.runtimes.docker_instance import DockerInstance
from pierhead.runtimes.readiness import wait_ready
from pierhead.sockets import connect_unix, open_unix

pytestmark = [pytest.mark.docker, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    docker_settings: RuntimeSettings, replicas: Path, smollm2_spec: LaunchSpec
) -> AsyncIterator[DockerInstance]:
    """SmolLM2 in a container, serving."""
    runtime = DockerRuntime(replicas / "inside", docker_settings)
    spec = await runtime.prepare(msgspec.structs.replace(smollm2_spec, replica="inside"), ignore)
    instance = await runtime.start(spec)
    try:
        await wait_ready(instance, timeout=60)
        yield instance
    finally:
        await instance.stop()
        await runtime.close()


async def look(instance: DockerInstance, code: str) -> object:
    """What Python code that prints JSON says inside the container."""
    found = await instance.exec(("python3", "-I", "-c", f"import json, os, errno, socket\n{code}"))
    assert found.code == 0, found.stderr.decode()
    return json.loads(found.stdout)


TRY = """
def attempt(do):
    try:
        do()
        return "done"
    except OSError as exc:
        return errno.errorcode[exc.errno]
"""


async def test_the_engine_answers_on_its_unix_socket(engine: DockerInstance) -> None:
    def ask() -> bytes:
        sock = connect_unix(engine.socket, timeout=30)
        with sock, sock.makefile("rb") as answer:
            body = b'{"messages":[{"role":"user","content":"Say hi."}],"max_tokens":8}'
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            return answer.read()

    answer = await asyncio.to_thread(ask)
    assert answer.startswith(b"HTTP/1.1 200")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"]


async def test_there_is_no_network_but_loopback(engine: DockerInstance) -> None:
    found = await look(
        engine,
        TRY + "s = socket.socket(); s.settimeout(3)\n"
        "print(json.dumps([os.listdir('/sys/class/net'), open('/proc/net/route').read().count('\\n'),"
        " attempt(lambda: s.connect(('192.0.2.1', 80)))]))",
    )
    assert found == [["lo"], 1, "ENETUNREACH"]


async def test_system_and_model_cannot_be_written(engine: DockerInstance) -> None:
    places = ["/", "/opt/engine", "/models", "/usr/lib", "/dev", "/var/tmp", "/proc/sys/kernel"]
    found = await look(
        engine,
        TRY + f"print(json.dumps([attempt(lambda: open(p + '/intruder', 'w')) for p in {places}]"
        " + [attempt(lambda: open(p, 'a')) for p in ('/etc/hosts', '/etc/resolv.conf', '/etc/passwd')]))",
    )
    assert isinstance(found, list)
    assert set(found) <= {"EROFS", "EACCES", "ENOENT"}, found
    assert found[2] == "EROFS"


async def test_all_processes_lack_capabilities_and_root_and_are_filtered(engine: DockerInstance) -> None:
    found = await look(
        engine,
        "out = []\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    lines = dict(x.split(':\\t', 1) for x in open(f'/proc/{pid}/status').read().splitlines() if ':\\t' in x)\n"
        "    out.append({k: lines[k].split() for k in ('CapInh','CapPrm','CapEff','CapBnd','CapAmb','NoNewPrivs',"
        "'Seccomp','Uid','Gid','Groups')})\n"
        "print(json.dumps(out))",
    )
    assert isinstance(found, list)
    assert len(found) >= 3  # init, the engine, this look
    for status in found:
        assert all(int(status[c][0], 16) == 0 for c in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
        assert status["NoNewPrivs"] == ["1"]
        assert status["Seccomp"] == ["2"]
        assert "0" not in status["Uid"] + status["Gid"] + status["Groups"]


async def test_dangerous_system_calls_fail(engine: DockerInstance) -> None:
    found = await look(
        engine,
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "out = []\n"
        "for call in (lambda: libc.unshare(0x10000000), lambda: libc.mount(b'x', b'/tmp', b'tmpfs', 0, None),\n"
        "             lambda: libc.syscall(250, 0, 0, 0, 0, 0), lambda: libc.swapoff(b'/x'),\n"
        "             lambda: libc.setuid(0), lambda: libc.syscall(321, 0, 0, 0)):\n"
        "    out.append([call(), ctypes.get_errno()])\n"
        "print(json.dumps(out))",
    )
    assert isinstance(found, list)
    assert all(result == -1 and number in (1, 38) for result, number in found), found  # EPERM or ENOSYS


async def test_temporary_files_are_few_and_never_programs(engine: DockerInstance) -> None:
    found = await look(
        engine,
        TRY + "import subprocess\n"
        "open('/tmp/x', 'w').write('#!/bin/sh\\necho ran\\n'); os.chmod('/tmp/x', 0o755)\n"
        "run = attempt(lambda: subprocess.run(['/tmp/x']))\n"
        "def fill():\n"
        "    with open('/tmp/fill', 'wb', buffering=0) as f:\n"
        "        for _ in range(80): f.write(bytes(1 << 20))\n"
        "full = attempt(fill); size = os.path.getsize('/tmp/fill'); os.unlink('/tmp/fill')\n"
        "print(json.dumps([run, full, size <= 64 << 20]))",
    )
    assert found == ["EACCES", "ENOSPC", True]


async def test_the_socket_folder_is_small_and_private(engine: DockerInstance) -> None:
    found = await look(
        engine,
        TRY + "def fill():\n"
        "    with open('/run/pierhead/fill', 'wb', buffering=0) as f:\n"
        "        for _ in range(4): f.write(bytes(1 << 20))\n"
        "full = attempt(fill); os.unlink('/run/pierhead/fill')\n"
        "def many():\n"
        "    for i in range(100): open(f'/run/pierhead/m{i}', 'w')\n"
        "count = attempt(many)\n"
        "for n in os.listdir('/run/pierhead'):\n"
        "    if n[0] == 'm': os.unlink('/run/pierhead/' + n)\n"
        "print(json.dumps([full, count]))",
    )
    assert found == ["ENOSPC", "ENOSPC"]
    seen = os.stat(Path(engine.socket).parent)
    assert stat.S_IMODE(seen.st_mode) == 0o700
    assert seen.st_uid != 0
    assert len(os.fsencode(engine.socket)) < 100


async def test_neither_docker_nor_the_host_shows(engine: DockerInstance) -> None:
    found = await look(
        engine,
        "socks = [os.path.join(d, f) for d, _, fs in os.walk('/run') for f in fs]\n"
        "mounts = [x.split()[4] for x in open('/proc/self/mountinfo')]\n"
        "devices = sorted(os.listdir('/dev'))\n"
        "print(json.dumps([socks, mounts, devices, sorted(os.environ), os.uname().nodename]))",
    )
    assert isinstance(found, list)
    socks, mounts, devices, names, host = found
    assert {s for s in socks if "sock" in s} == {"/run/pierhead/engine.sock", "/run/pierhead/notify.sock"}
    assert not [m for m in mounts if "docker.sock" in m or m.startswith(("/root", "/home", "/host"))]
    assert not {"mem", "kmsg", "kvm", "vda", "sda", "fuse"} & set(devices)
    assert set(names) - set(ENV) <= {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "HOSTNAME", "PYTHONDONTWRITEBYTECODE", "LC_CTYPE")
    }
    assert host == "engine"


async def test_the_memory_limit_is_what_was_planned(engine: DockerInstance) -> None:
    found = await look(
        engine,
        "paths = ('/sys/fs/cgroup/memory/memory.limit_in_bytes', '/sys/fs/cgroup/memory.max')\n"
        "print(json.dumps([int(open(p).read()) for p in paths if os.path.exists(p)]))",
    )
    wanted = engine.spec.limits.memory // 4096 * 4096
    assert found == [wanted]
    assert (await engine.stats()).memory_limit == wanted


class TestJobs:
    """Small programs that attack."""

    pytestmark = [pytest.mark.asyncio(loop_scope="function")]

    async def test_processes_cannot_multiply(self, docker: DockerRuntime, job) -> None:
        code = (
            "import os, time\nn = 0\ntry:\n"
            "  while n < 500:\n    n += 1\n    if os.fork() == 0: time.sleep(60)\n"
            "except OSError as e: print('stopped', n, e.errno, flush=True)"
        )
        instance = await docker.start(job(code, pids=32))
        await asyncio.wait_for(instance.wait(), 30)
        said = [line async for line in instance.logs()]
        await instance.stop(0)
        assert len(said) == 1
        _, count, number = said[0].split()
        assert int(count) <= 32
        assert number == b"11"  # EAGAIN

    async def test_taking_more_memory_than_allowed_ends_as_out_of_memory(self, docker: DockerRuntime, job) -> None:
        instance = await docker.start(job("x = bytearray(512 << 20); print(len(x))", memory=64 << 20))
        end = await asyncio.wait_for(instance.wait(), 30)
        await instance.stop(0)
        assert end.oom
        assert end.signal == 9

    async def test_a_socket_swapped_for_a_link_is_refused(self, docker: DockerRuntime, job) -> None:
        code = (
            "import os, time\nos.symlink('/var/run/docker.sock', '/run/pierhead/engine.sock')\n"
            "print('swapped', flush=True)\ntime.sleep(60)"
        )
        instance = await docker.start(job(code))
        async for line in instance.logs(follow=True):
            assert line == b"swapped\n"
            break
        assert os.readlink(instance.socket).endswith("docker.sock")
        with pytest.raises(ConnectionRefusedError), open_unix(instance.socket):
            pass
        await instance.stop(0)
