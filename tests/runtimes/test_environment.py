"""Python environments of engines: made once, shared, whole or not there; and an engine that runs in one."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pierhead.config import RuntimeSettings
from pierhead.engines.base import Environment, LaunchSpec
from pierhead.errors import RuntimeUnavailable, SourceUnavailable
from pierhead.events import AnyEvent, BuildProgress, ignore
from pierhead.runtimes import sandbox
from pierhead.runtimes.environment import Environments
from pierhead.runtimes.process import ProcessRuntime

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
