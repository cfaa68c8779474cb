"""Which runtime a replica gets while its image cannot be built."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from pierhead.engines.base import ImageRecipe, LaunchSpec
from pierhead.errors import SourceUnavailable
from pierhead.events import AnyEvent, Listener
from pierhead.fleet.choice import RuntimeChooser

from .conftest import Place

SPEC = LaunchSpec(replica="r1", model="m", engine="e", argv=(), model_dir="/m", image=ImageRecipe("e", "", ()))


class Offline(Place):
    """A Docker Engine that pulls no base image until the network is back."""

    online = False

    async def prepare(self, spec: LaunchSpec, listener: Listener) -> LaunchSpec:
        self.prepares += 1
        if not self.online:
            raise SourceUnavailable("the network is away")
        self.prepared = True
        return msgspec.structs.replace(spec, image_name="image")


async def test_an_image_that_could_not_be_built_is_tried_again_after_a_while(tmp_path: Path) -> None:
    now = 1000.0
    docker = Offline(tmp_path, "docker", prepared=False)
    chooser = RuntimeChooser({"docker": docker, "process": Place(tmp_path)}, "auto", lambda: now)
    said: list[AnyEvent] = []

    async def choose() -> str:
        name, _ = await chooser.choose(None, SPEC, said.append)
        await asyncio.gather(*chooser.builds)
        return name

    assert [await choose() for _ in range(3)] == ["process"] * 3
    assert docker.prepares == 1, "a build that fails is not begun at each start"
    assert "could not be built: the network is away" in str(said[-1])
    docker.online, now = True, now + 600
    assert [await choose(), await choose()] == ["process", "docker"]
    assert docker.prepares == 2
