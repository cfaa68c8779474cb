"""The docker runtime, imported only once a Docker Engine could be there; the runtime itself lives in ``runtimes``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pierhead.config import RuntimeSettings
from pierhead.engines.base import LaunchSpec
from pierhead.events import Listener
from pierhead.runtimes.base import Capabilities, Instance

if TYPE_CHECKING:
    from pierhead.runtimes.docker import DockerRuntime


class LazyDocker:
    """Answers "not here" by itself while no socket exists, since importing the real one costs a quarter second."""

    def __init__(self, replicas: Path, settings: RuntimeSettings) -> None:
        self._replicas = replicas
        self._settings = settings
        self._real: DockerRuntime | None = None

    def _plausible(self) -> bool:
        if self._settings.docker_host or os.environ.get("DOCKER_HOST"):
            return True
        run = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
        places = ("/var/run/docker.sock", "/run/podman/podman.sock", f"{run}/docker.sock", f"{run}/podman/podman.sock")
        return any(Path(p).exists() for p in places)

    def _runtime(self) -> DockerRuntime:
        if self._real is None:
            from pierhead.runtimes.docker import DockerRuntime

            self._real = DockerRuntime(self._replicas, self._settings)
        return self._real

    async def capabilities(self, spec: LaunchSpec | None = None) -> Capabilities:
        if self._real is None and not self._plausible():
            return Capabilities(name="docker", available=False, reason="no Docker Engine's socket is here")
        return await self._runtime().capabilities(spec)

    async def prepare(self, spec: LaunchSpec, listener: Listener) -> LaunchSpec:
        return await self._runtime().prepare(spec, listener)

    async def start(self, spec: LaunchSpec) -> Instance:
        return await self._runtime().start(spec)

    async def list(self) -> list[str]:
        if self._real is None and not self._plausible():
            return []
        return await self._runtime().list()

    async def adopt(self, replica: str) -> Instance | None:
        return await self._runtime().adopt(replica)

    async def aclose(self) -> None:
        """Let go of the Engine; containers go on."""
        if self._real is not None:
            await self._real.close()
