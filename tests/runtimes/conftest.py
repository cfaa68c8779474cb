"""What the runtimes' tests share: the real Docker Engine, the engine image, and small programs to run inside."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec, Limits, PlanRequest
from pierhead.engines.llamacpp import LlamaCpp
from pierhead.events import ignore
from pierhead.formats.gguf import read_file, summary
from pierhead.runtimes.docker import DockerRuntime
from pierhead.store.model import ModelFile


@pytest.fixture(scope="session")
def docker_settings() -> RuntimeSettings:
    """Settings that lead to the test host's Engine, with its registry as the mirror of Docker Hub."""
    host = os.environ.get("PIERHEAD_TEST_DOCKER")
    if not host:
        why = os.environ.get("PIERHEAD_TEST_DOCKER_REASON", "start it with `make test` as root")
        pytest.skip(f"no Docker Engine for tests (PIERHEAD_TEST_DOCKER is not set): {why}")
    return RuntimeSettings(docker_host=host, mirrors={"docker.io": (os.environ["PIERHEAD_TEST_REGISTRY"],)})


@pytest.fixture(scope="session")
def replicas() -> Iterator[Path]:
    """A folder with a short path, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="pier-d-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def smollm2_spec(smollm2: Path) -> LaunchSpec:
    """How SmolLM2 is served, with a small context."""
    request = PlanRequest(
        replica="smollm2",
        model="smollm2",
        model_dir=smollm2.parent,
        files=(ModelFile(smollm2.name, smollm2.stat().st_size),),
        metadata=summary(read_file(smollm2)),
        settings={"context": 512},
        free_memory=4 << 30,
        cpus=2,
    )
    return LlamaCpp().plan(request).spec


@pytest_asyncio.fixture
async def docker(docker_settings: RuntimeSettings, replicas: Path) -> AsyncIterator[DockerRuntime]:
    """The runtime; whatever a test leaves behind is ended."""
    runtime = DockerRuntime(replicas, docker_settings)
    yield runtime
    for replica in await runtime.list():
        if instance := await runtime.adopt(replica):
            await instance.stop(0)
    await runtime.close()


@pytest_asyncio.fixture
async def image(docker: DockerRuntime, smollm2_spec: LaunchSpec) -> str:
    """The id of the engine image, built if nobody has yet."""
    return (await docker.prepare(smollm2_spec, ignore)).image_name


@pytest.fixture
def job(image: str, tmp_path: Path):
    """Makes the spec of a small Python program in the engine image."""

    def make(code: str, *, replica: str = "job", memory: int = 128 << 20, pids: int = 64, **more: object) -> LaunchSpec:
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "weights.gguf").write_bytes(b"GGUF")
        return LaunchSpec(
            replica=replica,
            model="test",
            engine="test",
            kind="job",
            argv=("$(PYTHON)", "-I", "-u", "-c", code),
            model_dir=str(model),
            image_name=image,
            limits=Limits(memory=memory, pids=pids),
            **more,  # type: ignore[arg-type]
        )

    return make
