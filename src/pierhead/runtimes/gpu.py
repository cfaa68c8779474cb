"""NVIDIA's GPUs of this machine, as its management library (NVML) tells of them; decides nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from pierhead.engines.builds import Gpu
from pierhead.engines.gpus import NVIDIA, Device
from pierhead.errors import RuntimeUnavailable

HINT = "It needs an NVIDIA GPU with its driver (`nvidia-smi` lists it), or an engine that runs on the CPU."
log = logging.getLogger(__name__)


def _library() -> Any:
    import pynvml

    return pynvml


class Nvml:
    """NVIDIA's library, opened when it is first asked and kept; a machine without it has no GPUs.

    All its methods block, the first one for up to a second.
    """

    def __init__(self, library: Callable[[], Any] = _library) -> None:
        self._load = library
        self._library: Any = None
        self._opened = False
        self._why = ""

    def devices(self) -> tuple[Device, ...]:
        """Each GPU, with what is free on it now; none where there are none or the driver does not answer."""
        return tuple(self._devices())

    def uses(self) -> dict[int, dict[str, int]]:
        """The bytes that each process (by its id) has in the memory of each GPU, by CDI name."""
        found: dict[int, dict[str, int]] = {}
        for name, handle in self._handles():
            for one in self._running(handle):
                used = int(one.usedGpuMemory or 0)
                found.setdefault(int(one.pid), {})[name] = max(found.get(int(one.pid), {}).get(name, 0), used)
        return found

    def minors(self) -> dict[str, int]:
        """The number of each GPU's device file, by CDI name."""
        return {name: int(self._library.nvmlDeviceGetMinorNumber(handle)) for name, handle in self._handles()}

    def models(self) -> tuple[Gpu, ...]:
        """What an engine is built for; RuntimeUnavailable where there is no GPU, or nobody who could tell."""
        found = tuple(Gpu(d.title, d.driver, d.capability) for d in self._devices())
        if not found:
            raise RuntimeUnavailable(f"no NVIDIA GPU can be seen here: {self._why or 'NVML lists none'}", hint=HINT)
        return found

    def _devices(self) -> Iterator[Device]:
        nvml = self._library
        for name, handle in self._handles():
            nvml = self._library
            try:
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                yield Device(
                    name=name,
                    title=str(nvml.nvmlDeviceGetName(handle)),
                    total=int(memory.total),
                    free=int(memory.free),
                    capability=".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(handle))),
                    driver=str(nvml.nvmlSystemGetDriverVersion()),
                )
            except nvml.NVMLError as exc:
                self._note(exc)

    def _running(self, handle: Any) -> list[Any]:
        nvml, found = self._library, list[Any]()
        for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            try:
                found += ask(handle)
            except nvml.NVMLError as exc:
                self._note(exc)
        return found

    def _handles(self) -> Iterator[tuple[str, Any]]:
        if not self._open():
            return
        nvml = self._library
        try:
            for index in range(nvml.nvmlDeviceGetCount()):
                yield f"{NVIDIA}={index}", nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as exc:
            self._note(exc)

    def _open(self) -> bool:
        if not self._opened:
            self._opened = True
            library = self._load()
            try:
                library.nvmlInit()
            except library.NVMLError as exc:
                self._why = str(exc)
            else:
                self._library = library
        return self._library is not None

    def _note(self, exc: Exception) -> None:
        """The driver's complaint, once each."""
        if str(exc) != self._why:
            self._why = str(exc)
            log.warning("NVIDIA's management library: %s", exc)


NVML = Nvml()


def read_gpus(nvml: Nvml = NVML) -> tuple[Gpu, ...]:
    """The GPUs that an engine is built for; RuntimeUnavailable when there is none. Blocks."""
    return nvml.models()
