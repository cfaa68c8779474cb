"""Jobs in every runtime that has processes: run to their end, their output handed over, and nothing left."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec
from pierhead.errors import EngineFailed, Timeout
from pierhead.events import AnyEvent, BuildProgress, ignore
from pierhead.fleet import adoption
from pierhead.runtimes import sandbox
from pierhead.runtimes.job import finished
from pierhead.runtimes.process import ProcessRuntime

IMAGE = os.environ.get("PIERHEAD_TEST_IMAGE", "")
ID = f"rjob{os.getpid()}"  # control groups are the whole machine's
WRITES = """
import os, sys
print("half way", flush=True)
os.makedirs(sys.argv[1] + "/sub")
open(sys.argv[1] + "/sub/engine", "wb").write(b"x" * 1000)
print(open(sys.argv[2] + "/hosts.test").read() if os.path.exists(sys.argv[2] + "/hosts.test") else "", flush=True)
"""


def job(code: str, **changes: Any) -> LaunchSpec:
    facts: dict[str, Any] = {
        "replica": ID,
        "model": "m",
        "engine": "e",
        "kind": "job",
        "argv": ("$(PYTHON)", "-I", "-c", code, "$(OUTPUT)", "$(MODEL_DIR)"),
        "model_dir": "/usr/share",
        "image_name": IMAGE,
    }
    return LaunchSpec(**facts | changes)


@pytest.fixture(params=["bwrap", "plain", "docker"])
async def runtime(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Any, Path]]:
    if request.param == "bwrap" and not sandbox.bwrap_works():
        pytest.skip("bubblewrap does not work here")
    if request.param == "docker" and not (os.environ.get("PIERHEAD_TEST_DOCKER") and IMAGE):
        pytest.skip("PIERHEAD_TEST_DOCKER and PIERHEAD_TEST_IMAGE name no Docker Engine and no image")
    with tempfile.TemporaryDirectory(prefix="job-", dir="/tmp") as name:
        root = Path(name)
        made: Any
        if request.param == "docker":
            from pierhead.runtimes.docker import DockerRuntime

            made = DockerRuntime(root, RuntimeSettings(docker_host=os.environ["PIERHEAD_TEST_DOCKER"]))
        else:
            made = ProcessRuntime(root, RuntimeSettings(sandbox=request.param))
        yield made, root
        if request.param == "docker":
            await made.close()


async def test_a_job_hands_over_what_it_wrote_tells_how_it_gets_on_and_leaves_nothing(
    runtime: tuple[Any, Path],
) -> None:
    made, root = runtime
    told: list[AnyEvent] = []
    async with finished(made, job(WRITES), told.append, 60) as output:
        assert (output / "sub" / "engine").read_bytes() == b"x" * 1000
    assert not (root / ID).exists()
    assert await made.list() == []
    assert any(isinstance(e, BuildProgress) and e.step == "half way" for e in told)


async def test_a_job_that_fails_is_told_by_its_last_words_and_leaves_nothing(runtime: tuple[Any, Path]) -> None:
    made, root = runtime
    fails = WRITES + "\nprint('engine: the layer Foo is not supported', file=sys.stderr); sys.exit(3)"
    with pytest.raises(EngineFailed, match="the layer Foo is not supported"):
        async with finished(made, job(fails), ignore, 60):
            pytest.fail("it did not succeed")
    assert not (root / ID).exists()
    assert await made.list() == []


async def test_a_job_that_takes_too_long_is_ended(runtime: tuple[Any, Path]) -> None:
    made, root = runtime
    with pytest.raises(Timeout):
        async with finished(made, job("import time; time.sleep(600)"), ignore, 1.5):
            pytest.fail("it did not end")
    assert not (root / ID).exists()


async def test_a_job_may_write_into_its_output_alone(runtime: tuple[Any, Path]) -> None:
    made, _ = runtime
    if isinstance(made, ProcessRuntime) and not await made._sandboxed():  # pyright: ignore[reportPrivateUsage]
        pytest.skip("without a sandbox a process may write where its user may")
    tries = """
import os, sys
for place in (sys.argv[2], "/usr", "/etc", "/"):
    try: open(place + "/written", "w"); sys.exit(f"wrote into {place}")
    except OSError: pass
open(sys.argv[1] + "/ok", "w").write("ok")
"""
    async with finished(made, job(tries), ignore, 60) as output:
        assert (output / "ok").read_text() == "ok"


async def test_a_job_whose_daemon_was_killed_is_ended_by_the_next_one_with_all_it_wrote(
    runtime: tuple[Any, Path],
) -> None:
    made, root = runtime
    half = "import sys, time; open(sys.argv[1] + '/half', 'w').write('x'); print('wrote', flush=True); time.sleep(600)"
    instance = await made.start(job(half))
    async with asyncio.timeout(30):
        async for line in instance.logs(follow=True):
            if b"wrote" in line:
                break
    assert (root / ID / "out" / "half").exists()
    found = await adoption.find({"it": made}, _NoModels(), root)  # what the next daemon does first
    assert found == []
    assert not (root / ID).exists()
    assert await made.list() == []


class _NoModels:
    """A store that is not asked."""

    def get(self, name: str) -> Any:
        raise AssertionError(name)
