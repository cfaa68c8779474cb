"""Python environments of engines: made once, shared, whole or not there; and an engine that runs in one."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pierhead.config import RuntimeSettings
from pierhead.engines.base import Environment, LaunchSpec
from pierhead.errors import RuntimeUnavailable, SourceUnavailable
from pierhead.events import AnyEvent, BuildProgress, Listener, ignore
from pierhead.runtimes import sandbox
from pierhead.runtimes.environment import Environments, Report
from pierhead.runtimes.process import ProcessRuntime

from .test_docker_context import a_wheel

ROOT = Path(__file__).resolve().parents[2]
WANTED = Environment(("iniconfig==2.1.0",))  # small, without dependencies


@pytest.fixture(scope="module")
def shared() -> Iterator[Environments]:
    with tempfile.TemporaryDirectory(prefix="environments-", dir="/tmp") as name:
        yield Environments(Path(name))


def folders(place: Path) -> list[Path]:
    return [p for p in place.iterdir() if p.is_dir()]


async def test_callers_at_the_same_time_share_one_installation_that_later_ones_find(shared: Environments) -> None:
    steps: list[AnyEvent] = []
    found = await asyncio.gather(*(shared.ensure("e", WANTED, steps.append) for _ in range(3)))
    assert len(set(found)) == 1
    told = [s.step for s in steps if isinstance(s, BuildProgress)]
    assert told.count("installing iniconfig==2.1.0") == 1
    assert shared.find("e", WANTED) == found[0]
    steps.clear()
    assert await shared.ensure("e", WANTED, steps.append) == found[0]
    assert steps == []


async def test_an_installation_that_was_cut_off_does_not_count_and_is_made_anew(tmp_path: Path) -> None:
    environments = Environments(tmp_path)
    left = environments.place("e", WANTED)
    (left / "bin").mkdir(parents=True)
    (left / "bin" / "python").touch()
    assert environments.find("e", WANTED) is None
    python = await environments.ensure("e", WANTED, ignore)
    assert python.stat().st_size > 0


async def test_an_environment_whose_python_was_removed_is_made_anew(tmp_path: Path) -> None:
    environments = Environments(tmp_path)
    python = await environments.ensure("e", WANTED, ignore)
    python.unlink()
    python.symlink_to(tmp_path / "python-that-was-upgraded")
    assert environments.find("e", WANTED) is None
    assert environments.of("e") == []
    assert await environments.ensure("e", WANTED, ignore) == python
    assert python.exists()


class Scripted(Environments):
    """Its installer is a line of shell, run in the environment's folder."""

    def __init__(self, folder: Path, script: str) -> None:
        super().__init__(folder)
        self._script = script

    async def _make(self, place: Path, wanted: Environment, tell: Report) -> None:
        (place / "bin").mkdir(parents=True)
        (place / "bin" / "python").symlink_to(sys.executable)
        await self._run(("/bin/sh", "-c", f"cd {place}; {self._script}"), tell)
        (place / "ready.json").write_text("{}")


async def test_an_installer_that_outlives_its_daemon_ends_before_another_begins(tmp_path: Path) -> None:
    begun, go = tmp_path / "begun", tmp_path / "go"
    os.mkfifo(begun)
    os.mkfifo(go)
    script = f"echo it is > {begun}; read line < {go}; echo first >> written"
    code = "import asyncio, sys, pathlib; from tests.runtimes.test_environment import WANTED, Scripted, ignore; "
    code += "asyncio.run(Scripted(pathlib.Path(sys.argv[1]), sys.argv[2]).ensure('e', WANTED, ignore))"
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", code, tmp_path, script, cwd=ROOT)
    async with asyncio.timeout(30):
        assert await asyncio.to_thread(begun.read_text) == "it is\n"
    daemon.kill()
    await daemon.wait()
    after = Scripted(tmp_path, "echo second >> written")
    task = asyncio.create_task(after.ensure("e", WANTED, ignore))
    await asyncio.wait({task}, timeout=0.4)
    assert not task.done()
    await asyncio.to_thread(go.write_text, "go on\n")
    async with asyncio.timeout(20):
        await task
    assert (after.place("e", WANTED) / "written").read_text() == "second\n"


async def test_what_cannot_be_installed_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    environments = Environments(tmp_path)
    with pytest.raises(SourceUnavailable, match="pierhead-no-such-package") as refused:
        await environments.ensure("e", Environment(("pierhead-no-such-package==9",)), ignore)
    assert refused.value.data["log"]
    assert folders(tmp_path) == []


async def test_giving_up_ends_the_installer_and_leaves_nothing(tmp_path: Path) -> None:
    environments = Environments(tmp_path)
    begun = asyncio.Event()
    task = asyncio.create_task(environments.ensure("e", WANTED, lambda _: begun.set()))
    await asyncio.wait_for(begun.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert folders(tmp_path) == []


async def test_a_python_that_is_not_here_is_named(tmp_path: Path) -> None:
    environments = Environments(tmp_path, "pip", {"PATH": ""})
    with pytest.raises((RuntimeUnavailable, SourceUnavailable), match=r"Python 2\.9|pip"):
        await environments.ensure("e", Environment((), python="2.9"), ignore)


async def test_pruning_keeps_what_it_is_told_to(shared: Environments) -> None:
    await shared.ensure("e", WANTED, ignore)
    other = await shared.ensure("f", WANTED, ignore)
    assert shared.prune(frozenset({shared.place("e", WANTED).name})) == [other.parent.parent.name]
    assert shared.find("e", WANTED) is not None
    assert shared.find("f", WANTED) is None


@pytest.mark.parametrize("kind", ["bwrap", "plain"])
async def test_an_engine_runs_in_its_own_environment_and_not_in_ours(shared: Environments, kind: str) -> None:
    if kind == "bwrap" and not sandbox.bwrap_works():
        pytest.skip("bubblewrap does not work here")
    code = "import importlib.util as u, iniconfig; print('own', iniconfig.__name__, u.find_spec('msgspec'))"
    spec = LaunchSpec(
        replica="env", model="m", engine="e", argv=("$(PYTHON)", "-I", "-c", code), model_dir="/usr/share",
        environment=WANTED,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="env-", dir="/tmp") as name:
        runtime = ProcessRuntime(Path(name), RuntimeSettings(sandbox=kind), shared)
        instance = await runtime.start(await runtime.prepare(spec, ignore))
        async with asyncio.timeout(20):
            end = await instance.wait()
        said = [line async for line in instance.logs()]
        await instance.stop()
    assert (end.code, said) == (0, [b"own iniconfig None\n"])


async def test_with_an_index_the_first_comes_from_there_and_the_rest_from_the_users_own(tmp_path: Path) -> None:
    a_wheel(tmp_path / "index", "there")
    pins = ("iniconfig==2.1.0", "typing_extensions==4.15.0")
    wanted = Environment(pins, dependencies=False, index=(tmp_path / "index").as_uri())
    a_wheel(tmp_path / "other", "elsewhere")
    extra = {"PIP_EXTRA_INDEX_URL": (tmp_path / "other").as_uri(), "UV_INDEX": (tmp_path / "other").as_uri()}
    python = await Environments(tmp_path / "made", env={**os.environ, **extra}).ensure("e", wanted, ignore)
    site = next((python.parent.parent / "lib").glob("python*/site-packages"))
    assert (site / "iniconfig.py").read_text() == "WHERE = 'there'\n"
    assert (site / "typing_extensions.py").is_file()
    assert Environments(tmp_path).place("e", wanted) != Environments(tmp_path).place("e", Environment(pins))


class Offline(Environments):
    """Its index cannot be reached."""

    async def ensure(self, engine: str, wanted: Environment, listener: Listener) -> Path:
        raise SourceUnavailable("no index", hint="Check the network.")


async def test_who_cannot_get_packages_for_a_gpu_is_told_how_to_do_without(tmp_path: Path) -> None:
    spec = LaunchSpec(replica="r1", model="m", engine="e", argv=(), model_dir="/", environment=WANTED)
    runtime = ProcessRuntime(tmp_path / "replicas", RuntimeSettings(), Offline(tmp_path))
    for devices, told in (("nvidia.com/gpu=0",), True), ((), False):
        with pytest.raises(SourceUnavailable) as caught:
            await runtime.prepare(msgspec.structs.replace(spec, devices=devices), ignore)
        assert ("--option device=cpu" in (caught.value.hint or "")) is told
