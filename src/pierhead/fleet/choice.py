"""Which runtime a replica gets, and the image builds that ``auto`` starts behind its back; starts no replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import msgspec

from pierhead.engines.base import LaunchSpec
from pierhead.engines.gpus import NVIDIA
from pierhead.errors import PierError, RuntimeUnavailable, UsageError
from pierhead.events import Listener, Note, ignore
from pierhead.runtimes.base import Runtime

_AGAIN = 300.0  # seconds after which an image that could not be built is tried again: networks come back


class RuntimeChooser:
    """Knows the runtimes of this machine; ``auto`` means docker when it and the image are there, else process."""

    def __init__(
        self,
        runtimes: Mapping[str, Runtime],
        default: str,
        clock: Callable[[], float] = time.monotonic,
        gpus: Callable[[], bool] = lambda: False,
    ) -> None:
        self.runtimes = runtimes
        self._default = default
        self._gpus = gpus
        self._builds: dict[str, asyncio.Task[None]] = {}
        self._clock = clock
        self._broken: dict[str, tuple[float, str]] = {}  # when it is tried again, and why it failed

    def check(self, name: str | None) -> str:
        """The name to use for what a user asked for; UsageError when there is no such runtime."""
        wanted = name or self._default
        if wanted != "auto" and wanted not in self.runtimes:
            raise UsageError(
                f"there is no runtime '{wanted}'", hint=f"Use one of: auto, {', '.join(sorted(self.runtimes))}."
            )
        return wanted

    def check_gpus(self, name: str | None, spec: LaunchSpec) -> None:
        """RuntimeUnavailable where it is to use NVIDIA's GPUs and this machine has none; Docker may be elsewhere."""
        nvidia = any(device.startswith(f"{NVIDIA}=") for device in spec.devices)
        if nvidia and self.check(name) != "docker" and not self._gpus():
            raise RuntimeUnavailable(
                f"the engine '{spec.engine}' is to use {', '.join(spec.devices)}, and this machine has no NVIDIA GPU",
                hint="`pier doctor` says what it has; another engine or `--option device=cpu` may do without.",
            )

    async def choose(
        self, name: str | None, spec: LaunchSpec, listener: Listener, refusal: PierError | None = None
    ) -> tuple[str, Runtime]:
        """The runtime for ``spec``; RuntimeUnavailable when the one that was named cannot be used.

        ``refusal`` is why the choice before this one could not even start: ``auto`` then takes a process.
        """
        wanted = self.check(name)
        self.check_gpus(name, spec)
        if refusal is not None and (wanted != "auto" or _only_an_image(spec)):
            raise refusal
        if wanted == "auto":
            return self._process(refusal, listener) if refusal is not None else await self._auto(spec, listener)
        if wanted == "process" and spec.devices and _only_an_image(spec):
            raise RuntimeUnavailable(
                f"the engine '{spec.engine}' uses {', '.join(spec.devices)} in a container only",
                hint="`--runtime docker` gives it.",
            )
        runtime = self.runtimes[wanted]
        capabilities = await runtime.capabilities()
        if not capabilities.available:
            raise RuntimeUnavailable(
                f"the {wanted} runtime cannot be used: {capabilities.reason}",
                hint="`pier doctor` says what to install; `--runtime auto` takes what works.",
            )
        return wanted, runtime

    async def _auto(self, spec: LaunchSpec, listener: Listener) -> tuple[str, Runtime]:
        docker = self.runtimes.get("docker")
        only = _only_an_image(spec)
        if docker is not None and (only or spec.image is not None):
            capabilities = await docker.capabilities(spec)
            if capabilities.available and (only or capabilities.prepared):
                return "docker", docker
            if capabilities.available:
                listener(Note(message=self._build(docker, spec)))
        if only:
            why = f"is to use {', '.join(spec.devices)}" if spec.devices else f"is the image {spec.image_name}"
            raise RuntimeUnavailable(
                f"the engine '{spec.engine}' {why}, and no Docker Engine answers",
                hint="`pier doctor` says what to install.",
            )
        return self._process(None, listener)

    def _process(self, refusal: PierError | None, listener: Listener) -> tuple[str, Runtime]:
        process = self.runtimes.get("process")
        if process is None:
            raise refusal or RuntimeUnavailable("no runtime can be used", hint="`pier doctor` says what to install.")
        if refusal is not None:
            listener(Note(message=f"running as a process, because docker did not start: {refusal.message}"))
        return "process", process

    def _build(self, docker: Runtime, spec: LaunchSpec) -> str:
        key = str(hash(spec.image))
        again, why = self._broken.get(key, (0.0, ""))
        if why and self._clock() < again:
            return f"running as a process; the container image could not be built: {why}"
        if key not in self._builds:
            self._builds[key] = asyncio.create_task(self._prepare(key, docker, spec))
        return "running as a process while the container image is built; later starts will use docker"

    async def _prepare(self, key: str, docker: Runtime, spec: LaunchSpec) -> None:
        try:
            await docker.prepare(msgspec.structs.replace(spec), ignore)
            self._broken.pop(key, None)
        except PierError as exc:
            self._broken[key] = (self._clock() + _AGAIN, exc.message)
        finally:
            del self._builds[key]

    @property
    def builds(self) -> tuple[asyncio.Task[None], ...]:
        """The image builds that run now."""
        return tuple(self._builds.values())

    @property
    def building(self) -> bool:
        """Whether an image is being built now."""
        return bool(self._builds)

    async def close(self) -> None:
        """Give up the builds that run."""
        builds = list(self._builds.values())
        for task in builds:
            task.cancel()
        await asyncio.gather(*builds, return_exceptions=True)


def _only_an_image(spec: LaunchSpec) -> bool:
    """Whether the engine is somebody's image: it is not made of a recipe, or has no packages that could use its GPU."""
    if spec.image is None:
        return bool(spec.image_name)
    return bool(spec.devices) and spec.environment is None
