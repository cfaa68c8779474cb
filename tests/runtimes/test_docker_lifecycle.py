"""Containers from start to end: waiting, stopping, adopting, logs, commands and standard streams."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec
from pierhead.errors import RuntimeUnavailable
from pierhead.runtimes.docker import DockerRuntime
from pierhead.runtimes.docker_instance import reading
from pierhead.runtimes.readiness import wait_ready

docker_only = pytest.mark.docker
SLEEP = "import time; print('up', flush=True); time.sleep(600)"


async def up(instance) -> None:
    """Return once the program said its first word."""
    async with asyncio.timeout(30):
        async for _ in instance.logs(follow=True):
            return


@docker_only
async def test_the_exit_status_arrives_without_asking_and_stays(docker: DockerRuntime, job) -> None:
    instance = await docker.start(job("import sys; sys.exit(7)"))
    end = await asyncio.wait_for(instance.wait(), 30)
    assert (end.code, end.signal, end.oom) == (7, 0, False)
    assert end.at > 1e9
    assert await instance.stop() == end == await instance.wait()


@docker_only
async def test_stopping_ends_the_program_and_leaves_nothing(docker: DockerRuntime, job, replicas: Path) -> None:
    instance = await docker.start(job(SLEEP))
    await up(instance)
    await asyncio.wait_for(instance.stop(5), 10)
    assert await docker.list() == []
    assert not (replicas / "job").exists()
    assert not (replicas / "job" / "s").is_mount()


@docker_only
async def test_a_program_that_ignores_the_polite_signal_is_killed_in_time(docker: DockerRuntime, job) -> None:
    instance = await docker.start(job("import signal\nsignal.signal(15, signal.SIG_IGN)\n" + SLEEP))
    await up(instance)
    end = await asyncio.wait_for(instance.stop(0.5), 10)
    assert end.signal == 9
    assert not end.oom


@docker_only
async def test_a_container_removed_by_somebody_counts_as_ended(docker: DockerRuntime, job) -> None:
    instance = await docker.start(job(SLEEP))
    await up(instance)
    engine = (await docker.images())._engine
    await engine.docker.containers.container(instance.container).delete(force=True)
    end = await asyncio.wait_for(instance.wait(), 10)
    assert end.signal == 9
    await instance.stop()


@docker_only
async def test_another_daemon_adopts_what_runs(
    docker: DockerRuntime, docker_settings: RuntimeSettings, replicas: Path, image: str, smollm2_spec: LaunchSpec
) -> None:
    first = await docker.start(msgspec.structs.replace(smollm2_spec, replica="adopted", image_name=image))
    await wait_ready(first, timeout=60)
    later = DockerRuntime(replicas, docker_settings)
    try:
        assert await later.list() == ["adopted"]
        taken = await later.adopt("adopted")
        assert taken is not None
        assert taken.spec == first.spec
        assert taken.socket == first.socket
        await wait_ready(taken, timeout=10)
        await taken.stop()
        await asyncio.wait_for(first.wait(), 10)
        assert await later.adopt("adopted") is None
    finally:
        await later.close()


@docker_only
async def test_a_container_whose_spec_was_changed_is_removed_and_not_adopted(
    docker: DockerRuntime, job, replicas: Path
) -> None:
    instance = await docker.start(job(SLEEP))
    file = replicas / "job" / "spec.json"
    file.write_bytes(file.read_bytes().replace(b'"model":"test"', b'"model":"evil"'))
    assert await docker.adopt("job") is None
    assert await docker.list() == []
    await instance.wait()
    await instance.stop()


@docker_only
async def test_an_ended_container_of_a_dead_daemon_is_listed_and_put_away(docker: DockerRuntime, job) -> None:
    instance = await docker.start(job("pass"))
    await instance.wait()
    assert await docker.list() == ["job"]
    assert await docker.adopt("job") is None
    assert await docker.list() == []
    await instance.stop()


@docker_only
async def test_installations_do_not_see_each_others_containers(
    docker: DockerRuntime, docker_settings: RuntimeSettings, replicas: Path, job
) -> None:
    other = DockerRuntime(replicas / "other", docker_settings)
    mine, theirs = await docker.start(job(SLEEP)), await other.start(job(SLEEP))
    try:
        assert await docker.list() == ["job"]
        found = await other.adopt("job")
        assert found is not None
        assert found.container == theirs.container != mine.container
    finally:
        await theirs.stop(0)
        await mine.stop(0)
        await other.close()


@docker_only
async def test_a_replica_can_be_started_again_after_it_crashed(docker: DockerRuntime, job) -> None:
    first = await docker.start(job("raise SystemExit(1)"))
    await first.wait()
    second = await docker.start(job(SLEEP))
    await up(second)
    await second.stop(0)


@docker_only
async def test_logs_give_whole_lines_their_tail_and_follow_to_the_end(docker: DockerRuntime, job) -> None:
    code = (
        "import sys\nfor i in range(200): print('line', i, flush=True)\n"
        "sys.stderr.write('x' * 200000 + '\\n'); sys.stdout.buffer.write(b'\\xff raw\\nno end')"
    )
    instance = await docker.start(job(code))
    followed = [line async for line in instance.logs(follow=True)]
    await instance.wait()
    everything = [line async for line in instance.logs()]
    tail = [line async for line in instance.logs(tail=2)]
    await instance.stop()
    assert set(followed) <= set(everything)
    assert len(followed) >= len(everything) - 1  # old Engines may lose the last words when following
    assert everything[:2] == [b"line 0\n", b"line 1\n"]
    assert [line for line in everything if line.endswith(b" raw\n")]
    assert max(len(line) for line in everything) <= (1 << 16) + 1
    assert len(tail) <= 3


@docker_only
async def test_commands_run_inside_with_bounded_output_and_time(docker: DockerRuntime, job) -> None:
    instance = await docker.start(job(SLEEP))
    await up(instance)
    found = await instance.exec(("sh", "-c", "echo out; echo err >&2; exit 3"))
    assert (found.code, found.stdout, found.stderr) == (3, b"out\n", b"err\n")
    found = await instance.exec(("python3", "-c", "print('x' * (3 << 20))"))
    assert len(found.stdout) == 1 << 20
    with pytest.raises(TimeoutError):
        await instance.exec(("sleep", "60"), timeout=0.5)
    await instance.stop(0)


@docker_only
async def test_standard_streams_carry_any_bytes_both_ways(docker: DockerRuntime, job) -> None:
    code = "import sys\nsys.stdout.buffer.write(b'hello\\n'); sys.stdout.flush()\n"
    code += "sys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])"
    instance = await docker.start(job(code, stdio=True))
    reader, writer = await instance.attach()
    assert await asyncio.wait_for(reader.readline(), 20) == b"hello\n"
    data = bytes(range(256)) * 4096
    writer.write(data)
    await writer.drain()
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(-1), 20) == data[::-1]
    writer.close()
    assert (await instance.wait()).code == 0
    await instance.stop()


@docker_only
async def test_an_image_that_is_not_here_is_said_before_anything_starts(docker: DockerRuntime, job, replicas) -> None:
    spec = msgspec.structs.replace(job("pass", replica="none"), image_name="sha256:" + "0" * 64)
    with pytest.raises(RuntimeUnavailable):
        await docker.start(spec)
    assert not (replicas / "none").exists()


@docker_only
async def test_a_failed_start_leaves_nothing(docker: DockerRuntime, job, replicas: Path) -> None:
    spec = msgspec.structs.replace(job("pass", replica="broken"), argv=("/no/such/program",))
    instance = None
    try:
        instance = await docker.start(spec)  # with an init process the failure comes as the exit
    except RuntimeUnavailable:
        assert not (replicas / "broken").exists()
    if instance is not None:
        assert (await instance.wait()).code == 127
        await instance.stop()
    spec = msgspec.structs.replace(job("pass", replica="broken"), devices=("vendor.example/gpu=0",))
    with pytest.raises(RuntimeUnavailable):
        await docker.start(spec)
    assert not (replicas / "broken").exists()
    assert await docker.list() == []


async def test_without_an_engine_the_capabilities_say_so(tmp_path: Path) -> None:
    settings = RuntimeSettings(docker_host=f"unix://{tmp_path}/none.sock")
    runtime = DockerRuntime(tmp_path, settings)
    found = await runtime.capabilities()
    assert not found.available
    assert "none.sock" in found.reason
    assert await runtime.list() == []


@docker_only
async def test_a_socket_for_others_is_denied_with_what_to_do(docker_settings: RuntimeSettings) -> None:
    code = (
        "import os, sys\nfrom pierhead.errors import AccessDenied\nfrom pierhead.runtimes.docker_api import find\n"
        "find(sys.argv[1])  # with all that it imports: those folders may be closed to others\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: find(sys.argv[1])\nexcept AccessDenied as exc: print(exc.hint)"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code, docker_settings.docker_host], capture_output=True, timeout=30
    )
    assert b"usermod -aG docker" in done.stdout, done.stderr


@pytest.mark.parametrize("configured", [True, False])
def test_a_socket_in_a_folder_closed_to_this_user_is_denied_or_not_seen(tmp_path: Path, configured: bool) -> None:
    closed = tmp_path / ".docker" / "run"
    closed.mkdir(parents=True)
    for folder in list(tmp_path.parents)[:2]:  # pytest's own are closed to others
        folder.chmod(0o755)
    tmp_path.chmod(0o755)
    (closed / "docker.sock").touch()
    closed.chmod(0o000)
    code = (
        "import os, sys\nfrom pierhead.errors import PierError\nfrom pierhead.runtimes.docker_api import find\n"
        "os.getuid() or (os.setgroups([]), os.setgid(65534), os.setuid(65534))\n"
        "try: find(sys.argv[1], {'HOME': sys.argv[2], 'XDG_RUNTIME_DIR': sys.argv[2]})\n"
        "except PierError as exc: print(type(exc).__name__)"
    )
    host = f"unix://{closed}/docker.sock" if configured else ""
    try:
        done = subprocess.run([sys.executable, "-c", code, host, str(tmp_path)], capture_output=True, timeout=30)
    finally:
        closed.chmod(0o755)
    assert done.stdout.strip() in ({b"AccessDenied"} if configured else {b"RuntimeUnavailable", b"AccessDenied"}), (
        done.stderr
    )


def test_figures_of_both_kinds_of_control_groups_are_read() -> None:
    v1 = {"memory_stats": {"usage": 100, "limit": 500, "stats": {"total_inactive_file": 40}}}
    v2 = {
        "memory_stats": {"usage": 100, "limit": 500, "stats": {"inactive_file": 30}},
        "cpu_stats": {"cpu_usage": {"total_usage": 2_500_000_000}},
        "blkio_stats": {"io_service_bytes_recursive": [{"op": "read", "value": 7}, {"op": "Write", "value": 9}]},
    }
    assert (reading(v1).memory, reading(v2).memory) == (60, 70)
    assert (reading(v2).cpu_seconds, reading(v2).read_bytes, reading(v2).written_bytes) == (2.5, 7, 9)
    assert reading({"memory_stats": {}, "blkio_stats": {"io_service_bytes_recursive": None}}).memory == 0
