"""Engine images: names, the pull through a mirror, the build without network, and a base that lacks a library."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
import time
import uuid
from pathlib import Path

import msgspec
import pytest

from pierhead.config import RuntimeSettings
from pierhead.engines.base import ImageRecipe, LaunchSpec
from pierhead.errors import SourceUnavailable
from pierhead.events import AnyEvent, BuildProgress, ignore
from pierhead.runtimes.docker import DockerRuntime
from pierhead.runtimes.docker_api import Engine
from pierhead.runtimes.docker_context import write_context
from pierhead.runtimes.docker_image import image_name, parse_image
from pierhead.runtimes.readiness import wait_ready

RECIPE = ImageRecipe("llamacpp", "docker.io/library/python:3.11", ("xllamacpp==1",), (("/opt/engine/entry.py", "1"),))


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.11-slim", "docker.io/library/python:3.11-slim"),
        ("someone/thing:1", "docker.io/someone/thing:1"),
        ("registry.example:5000/a/b", "registry.example:5000/a/b:latest"),
        ("localhost/a:2", "localhost/a:2"),
        ("ghcr.io/a/b@sha256:" + "0" * 64, "ghcr.io/a/b@sha256:" + "0" * 64),
    ],
)
def test_image_references_are_read_as_docker_reads_them(text: str, full: str) -> None:
    assert str(parse_image(text)) == full


def test_the_same_inputs_give_the_same_name_and_any_other_input_another() -> None:
    name = image_name(RECIPE, "x86_64")
    assert name == image_name(msgspec.json.decode(msgspec.json.encode(RECIPE), type=ImageRecipe), "x86_64")
    assert name.startswith("pierhead/engine-llamacpp:")
    others = [
        image_name(msgspec.structs.replace(RECIPE, base="docker.io/library/python:3.12"), "x86_64"),
        image_name(msgspec.structs.replace(RECIPE, requirements=("xllamacpp==2",)), "x86_64"),
        image_name(msgspec.structs.replace(RECIPE, files=(("/opt/engine/entry.py", "2"),)), "x86_64"),
        image_name(msgspec.structs.replace(RECIPE, index="https://wheels.example/cu128"), "x86_64"),
        image_name(RECIPE, "aarch64"),
    ]
    assert len({name, *others}) == 6


def test_the_build_context_does_not_depend_on_when_and_where_it_was_written(tmp_path: Path) -> None:
    made: list[bytes] = []
    for turn in ("a", "b"):
        site = tmp_path / turn / "site"
        (site / "pkg" / "__pycache__").mkdir(parents=True)
        (site / "pkg" / "__pycache__" / "x.pyc").write_text(turn)
        for name in ("b.py", "a.py") if turn == "a" else ("a.py", "b.py"):
            (site / "pkg" / name).write_text(name)
            os.utime(site / "pkg" / name, (len(made), len(made)))
        write_context(RECIPE, "base", "other-machine", site, tmp_path / f"{turn}.tar")
        made.append((tmp_path / f"{turn}.tar").read_bytes())
    assert made[0] == made[1]
    with tarfile.open(fileobj=io.BytesIO(made[0])) as tar:
        names = tar.getnames()
    assert "opt/engine/entry.py" in names
    assert not [n for n in names if "pycache" in n]


async def forget(runtime: DockerRuntime, spec: LaunchSpec, base: str) -> None:
    """Remove what a test built and tagged."""
    images = await runtime.images()
    assert spec.image is not None
    for name in (image_name(images.resolve(spec.image), images.machine), base):
        if await images.find(name):
            await images._engine.docker.images.delete(name, force=True)


def based_on(spec: LaunchSpec, base: str, replica: str) -> LaunchSpec:
    assert spec.image is not None
    return msgspec.structs.replace(spec, replica=replica, image=msgspec.structs.replace(spec.image, base=base))


@pytest.mark.docker
async def test_the_base_comes_through_the_mirror_and_the_second_time_nothing_is_done(
    docker_settings: RuntimeSettings, replicas: Path, smollm2_spec: LaunchSpec
) -> None:
    log = Path(os.environ["PIERHEAD_TEST_REGISTRY_LOG"])
    before = len(await asyncio.to_thread(log.read_text))
    name = f"r{uuid.uuid4().hex[:8]}.invalid"
    base = f"{name}/library/python:3.11-slim-bookworm"
    mirrors = {name: ("gone.invalid:5000", os.environ["PIERHEAD_TEST_REGISTRY"])}
    runtime = DockerRuntime(replicas / "mirror", msgspec.structs.replace(docker_settings, mirrors=mirrors))
    spec = based_on(smollm2_spec, base, "mirror")
    try:
        assert not (await runtime.capabilities(spec)).prepared
        events: list[AnyEvent] = []
        first, again = await asyncio.gather(runtime.prepare(spec, events.append), runtime.prepare(spec, ignore))
        assert first.image_name == again.image_name
        assert first.image_name.startswith("sha256:")
        assert any(isinstance(e, BuildProgress) and e.step == "done" for e in events) or not events
        said = (await asyncio.to_thread(log.read_text))[before:]
        assert "/v2/library/python/manifests/3.11-slim-bookworm" in said
        assert await (await runtime.images()).find(base)

        events.clear()
        began = time.monotonic()
        assert await runtime.prepare(spec, events.append) == first
        assert time.monotonic() - began < 1
        assert events == []
        assert (await runtime.capabilities(spec)).prepared
    finally:
        await forget(runtime, spec, base)
        await runtime.close()


@pytest.mark.docker
async def test_a_base_that_nobody_has_says_where_it_was_looked_for(
    docker: DockerRuntime, smollm2_spec: LaunchSpec
) -> None:
    with pytest.raises(SourceUnavailable) as caught:
        await docker.prepare(based_on(smollm2_spec, "nowhere.invalid/python:3", "nowhere"), ignore)
    assert "nowhere.invalid/python:3" in caught.value.message
    assert "runtime.mirrors" in (caught.value.hint or "")


async def build(engine: Engine, name: str, dockerfile: str) -> None:
    """Build an image out of a Dockerfile alone."""
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        info = tarfile.TarInfo("Dockerfile")
        info.size = len(dockerfile)
        tar.addfile(info, io.BytesIO(dockerfile.encode()))
    headers = {"Content-Type": "application/x-tar"}
    async for _ in engine.progress("build", {"t": name, "networkmode": "none"}, context.getvalue(), headers):
        pass


@pytest.mark.docker
async def test_an_image_works_on_a_base_without_libgomp_as_slim_python_is(
    docker: DockerRuntime, image: str, smollm2_spec: LaunchSpec
) -> None:
    images = await docker.images()
    base = "localhost/pierhead-test/slim:1"
    await build(
        images._engine,
        base,
        "FROM docker.io/library/python:3.11-slim-bookworm\nRUN rm -f /usr/lib/*/libgomp.so.1*\n",
    )
    spec = based_on(smollm2_spec, base, "slim")
    try:
        instance = await docker.start(await docker.prepare(spec, ignore))
        await wait_ready(instance, timeout=60)
        maps = await instance.exec(("sh", "-c", "grep -h libgomp /proc/[0-9]*/maps"))
        await instance.stop()
        assert b"/opt/engine/lib/libgomp.so.1" in maps.stdout
    finally:
        await forget(docker, spec, base)


@pytest.mark.docker
async def test_pruning_keeps_what_is_named_or_used(docker: DockerRuntime, job, smollm2_spec: LaunchSpec) -> None:
    images = await docker.images()
    old = msgspec.structs.replace(RECIPE, base="docker.io/library/python:3.11-slim-bookworm", requirements=())
    made = await images.ensure(old, ignore)
    assert smollm2_spec.image is not None
    used = await docker.start(job("import time; time.sleep(60)"))
    gone = await images.prune(keep=(smollm2_spec.image,))
    await used.stop(0)
    assert image_name(images.resolve(old), images.machine) in gone
    assert await images.find(made) is None
    assert await images.find(used.spec.image_name)
