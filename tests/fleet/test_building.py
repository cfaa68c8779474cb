"""What an engine needs built for a machine: built once by a scripted builder, kept with the model, found again."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec
from pierhead.engines.builds import Build, Gpu
from pierhead.errors import CorruptData, EngineFailed, RuntimeUnavailable
from pierhead.events import AnyEvent, Note, ignore
from pierhead.fleet.building import Builder
from pierhead.runtimes.process import ProcessRuntime
from pierhead.store.layout import Store
from pierhead.store.media import FILE
from pierhead.store.model import Layer, ModelRecord

GPU = Gpu("GPU X", "1.0", "9.0")
BUILDER = """
import os, sys
source, target = sys.argv[1:]
open(os.path.join(target, "config.json"), "w").write("{}")
os.mkdir(os.path.join(target, "deep"))
open(os.path.join(target, "deep", "rank0.engine"), "w").write(open(os.path.join(source, "weights")).read().upper())
"""


class Site:
    """A store with a model, a runtime that counts its starts, and a builder for the GPUs it is told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store.open(root / "store")
        (root / "weights").write_text("ahoy")
        blob = self.store.adopt_file(root / "weights")
        layers = [Layer(blob.digest, blob.size, FILE, "weights", "weights")]
        self.model: ModelRecord = self.store.commit_model("m", layers=layers, metadata={}, annotations={})
        self.replicas = root / "replicas"
        self.runtime = ProcessRuntime(self.replicas, RuntimeSettings(sandbox="plain"))
        self.starts = 0
        start = self.runtime.start

        async def counted(spec: LaunchSpec) -> Any:
            self.starts += 1
            return await start(spec)

        self.runtime.start = counted  # pyright: ignore[reportAttributeAccessIssue]

    def spec(self, code: str = BUILDER, **changes: Any) -> LaunchSpec:
        argv = ("$(PYTHON)", "-I", "-c", code, "$(MODEL_DIR)", "$(OUTPUT)")
        facts: dict[str, Any] = {"tool": "builder", "version": "1", "argv": argv, "timeout": 60.0}
        return LaunchSpec(
            replica="r1",
            model="m",
            engine="e",
            argv=("serve", "$(BUILT)", "$(SOCKET)"),
            model_dir=str(self.store.materialize(self.model)),
            build=Build(**facts | changes),
        )

    async def build(self, spec: LaunchSpec, *gpus: Gpu, listener: Any = ignore) -> Path:
        builder = Builder(self.store, self.replicas, lambda: gpus or (GPU,))
        return Path((await builder.ensure(spec, self.model, self.runtime, listener)).built)

    @property
    def left(self) -> list[str]:
        return [p.name for p in self.replicas.iterdir() if not p.name.startswith(".")]


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="build-", dir="/tmp") as name:
        yield Site(Path(name))


async def test_the_first_start_builds_and_the_second_on_an_equal_machine_does_not(site: Site) -> None:
    told: list[AnyEvent] = []
    first = await site.build(site.spec(), listener=told.append)
    assert (first / "deep" / "rank0.engine").read_text() == "AHOY"
    assert any(isinstance(e, Note) and "GPU X (driver 1.0)" in e.message for e in told)
    assert site.left == []
    assert await site.build(site.spec()) == first
    assert site.starts == 1


async def test_another_gpu_driver_tool_or_setting_has_a_result_of_its_own(site: Site) -> None:
    places = {
        await site.build(site.spec()),
        await site.build(site.spec(), Gpu("GPU X", "2.0", "9.0")),
        await site.build(site.spec(version="2")),
        await site.build(site.spec(settings={"--a": "b"})),
    }
    assert len(places) == 4
    assert site.starts == 4


async def test_replicas_that_need_the_same_share_one_build(site: Site) -> None:
    found = await asyncio.gather(*(site.build(site.spec()) for _ in range(4)))
    assert len(set(found)) == 1
    assert site.starts == 1


async def test_what_was_built_stays_as_long_as_the_model_and_goes_with_it(site: Site) -> None:
    place = await site.build(site.spec())
    site.store.collect()
    assert (place / "config.json").exists()
    assert [m.name for m in site.store.models()] == ["m"]
    site.store.remove("m")
    assert site.store.referrers(site.model.digest) == []
    assert list((site.store.root / "blobs" / "sha256").iterdir()) == []


async def test_a_builder_that_fails_says_why_keeps_nothing_and_may_be_tried_again(site: Site) -> None:
    with pytest.raises(EngineFailed, match="error: unsupported layer"):
        await site.build(site.spec(BUILDER + "\nsys.exit('error: unsupported layer')"))
    assert site.left == []
    assert site.store.referrers(site.model.digest) == []
    assert (await site.build(site.spec())).is_dir()


@pytest.mark.parametrize(
    "evil",
    [
        "os.symlink('/etc/passwd', os.path.join(target, 'secrets'))",
        "os.symlink('/etc', os.path.join(target, 'folder'))",
        "os.mkfifo(os.path.join(target, 'pipe'))",
    ],
)
async def test_a_builder_cannot_bring_other_files_of_this_machine_into_the_store(site: Site, evil: str) -> None:
    with pytest.raises(CorruptData, match="which is no file"):
        await site.build(site.spec(f"{BUILDER}\n{evil}"))
    assert site.left == []
    assert site.store.referrers(site.model.digest) == []


async def test_a_builder_that_makes_nothing_is_an_error(site: Site) -> None:
    with pytest.raises(CorruptData, match="no files"):
        await site.build(site.spec("pass"))


async def test_a_machine_without_a_gpu_refuses_before_anything_runs(site: Site) -> None:
    def none() -> tuple[Gpu, ...]:
        raise RuntimeUnavailable("no NVIDIA GPU can be seen here")

    with pytest.raises(RuntimeUnavailable, match="no NVIDIA GPU"):
        await Builder(site.store, site.replicas, none).ensure(site.spec(), site.model, site.runtime, ignore)
    assert site.starts == 0


async def test_an_engine_that_needs_nothing_built_is_left_as_it_is(site: Site) -> None:
    spec = msgspec.structs.replace(site.spec(), build=None)
    assert await Builder(site.store, site.replicas).ensure(spec, site.model, site.runtime, ignore) == spec
