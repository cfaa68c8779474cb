"""Sees that what an engine needs built for this machine is there before it starts: from the store, or by a job."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable
from pathlib import Path

import msgspec

from pierhead.engines.base import LaunchSpec
from pierhead.engines.builds import Build, Gpu, key
from pierhead.events import Listener, Note
from pierhead.fleet import record as records
from pierhead.runtimes.base import Runtime
from pierhead.runtimes.gpu import read_gpus
from pierhead.runtimes.job import finished
from pierhead.runtimes.lock import locked
from pierhead.store import derived
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord


class Builder:
    """Builds each thing once, however many replicas wait for it; ``folder`` holds the locks."""

    def __init__(self, store: Store, folder: Path, gpus: Callable[[], tuple[Gpu, ...]] = read_gpus) -> None:
        self._store = store
        self._folder = folder
        self._gpus = gpus

    async def ensure(self, spec: LaunchSpec, model: ModelRecord, runtime: Runtime, listener: Listener) -> LaunchSpec:
        """The spec with the place of what was built; unchanged where nothing has to be.

        RuntimeUnavailable where this machine has no GPU to build for; EngineFailed with the builder's last words.
        """
        build = spec.build
        if build is None:
            return spec
        gpus = await asyncio.to_thread(self._gpus)
        name = key(build, model.digest, gpus, platform.machine())
        async with locked(self._folder / f".build-{name[:16]}.lock"):
            place = await asyncio.to_thread(derived.find, self._store, model.digest, name)
            if place is None:
                listener(
                    Note(message=f"building '{spec.model}' with {build.tool} for {_told(gpus)}; this is done once")
                )
                place = await self._build(spec, build, model, name, gpus, runtime, listener)
        return msgspec.structs.replace(spec, built=str(place))

    async def _build(
        self,
        spec: LaunchSpec,
        build: Build,
        model: ModelRecord,
        name: str,
        gpus: tuple[Gpu, ...],
        runtime: Runtime,
        listener: Listener,
    ) -> Path:
        job = msgspec.structs.replace(
            spec, replica=records.new_id(), argv=build.argv, kind="job", build=None, built="", serves=()
        )
        about = {
            "ai.pierhead.derived.tool": f"{build.tool} {build.version}",
            "ai.pierhead.derived.for": _told(gpus),
        }
        async with finished(runtime, job, listener, build.timeout) as output:
            return await asyncio.to_thread(derived.keep, self._store, model.digest, name, output, about)


def _told(gpus: tuple[Gpu, ...]) -> str:
    return ", ".join(sorted({f"{g.name} (driver {g.driver})" for g in gpus}))
