"""Where llama.cpp works: which build of it for which GPU, and how many layers of a model go there; pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pierhead.engines.base import Environment, PlanRequest
from pierhead.engines.gpus import NVIDIA, Device, take, visible
from pierhead.errors import OutOfMemory, UsageError
from pierhead.formats.offload import Offload, fit_full, fit_layers, offload
from pierhead.formats.shape import Facts

INDEX = "https://xorbitsai.github.io/xllamacpp/whl"
# By build, as its index names it: the libraries that it is linked to and does not bring.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "cu128": ("nvidia-cuda-runtime-cu12==12.8.90", "nvidia-cublas-cu12==12.8.4.1"),
    "cu132": ("nvidia-cuda-runtime==13.2.86", "nvidia-cublas==13.3.0.5"),
    "vulkan": (),
    "rocm-7.2.4": (),
}
DEVICES = ("auto", "cpu", "cuda", "vulkan", "rocm")
GLIBC = (2, 35)  # that the builds ask for
# Drivers by their first number. What is compiled when it starts needs a driver as new as the build's CUDA; machine code
# needs one of its generation.
_RUNS = {"cu128": (525, 570), "cu132": (580, 595)}
_CODE = {"cu128": (8.6, 8.7, 8.9, 12.0), "cu132": (7.5, 8.6, 8.7, 8.9, 12.0, 12.1)}  # of GPUs, in the build
_OLDEST = 7.5  # that CUDA 13 knows
SMALLEST = 512  # tokens: no default context is chosen below this
SHORTEST = 2048  # tokens: below this, layers are left to the processor rather than the default context made shorter
_MARGIN = 0.95  # of what is free, where layers or a context are chosen to fill it
_SPLITS = 128  # numbers that llama.cpp's tensor_split has


class Wishes(NamedTuple):
    """What a user says of GPUs; ``layers`` is None where it is for us to choose, and -1 for all of them."""

    device: str
    gpus: tuple[str, ...]
    layers: int | None

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Wishes:
        """Takes ``device`` and ``gpus`` out of the settings; ``n_gpu_layers`` stays, for the CPU's build."""
        given = settings.get("n_gpu_layers", -1)
        gpus = tuple(word for word in (g.strip() for g in settings.pop("gpus", "all").split(",")) if word)
        return cls(settings.pop("device", "auto"), gpus, None if given == -1 else max(given, -1))


class Build(NamedTuple):
    """A build of llama.cpp: ``name`` in its index ("": Pierhead's own, for the CPU), and what is to be said of it."""

    name: str = ""
    note: str = ""

    def requirements(self, version: str) -> tuple[str, ...]:
        """Exact pins; llama.cpp itself comes first, which the index has."""
        return (f"xllamacpp=={version}", *LIBRARIES.get(self.name, ()))

    def environment(self, version: str, index: str) -> Environment | None:
        """One of its own, from the build's part of the ``index``; None for Pierhead's."""
        if not self.name:
            return None
        return Environment(self.requirements(version), dependencies=False, index=f"{index.rstrip('/')}/{self.name}")


CPU = Build()


@dataclass(frozen=True)
class Fit:
    """Layers on GPUs: ``context`` tokens, bytes by device, and the CDI names of what the engine is given."""

    parts: Offload
    context: int
    devices: dict[str, int]
    names: tuple[str, ...]
    title: str

    @property
    def settings(self) -> dict[str, Any]:
        """For llama.cpp; several GPUs have equal shares, and see themselves as the first ones."""
        split = [1.0] * self.parts.gpus + [0.0] * (_SPLITS - self.parts.gpus)
        told = {"gpus": self.parts.gpus, "n_gpu_layers": self.parts.layers}
        return told | ({"tensor_split": split} if self.parts.gpus > 1 else {})

    @property
    def note(self) -> str:
        """What a person is told."""
        rest = "" if self.parts.layers == self.parts.of else "; the rest on the processor"
        return f"{self.parts.layers} of {self.parts.of} layers on {self.title}{rest}"


def build_for(wishes: Wishes, devices: Sequence[Device]) -> Build:
    """The build that the wishes and this machine's GPUs ask for."""
    if wishes.device in ("vulkan", "rocm"):
        return Build("rocm-7.2.4" if wishes.device == "rocm" else "vulkan")
    here = _nvidia(devices, wishes.gpus) or _nvidia(devices)
    if wishes.device == "cpu" or (wishes.device == "auto" and (not here or wishes.layers == 0)):
        return CPU
    if not here:
        return Build("cu128")
    driver = min(_driver(d) for d in here)
    name = next((n for n in ("cu132", "cu128") if _runs(n, driver, here)), "")
    if name:
        return Build(name)
    why = f"the driver {here[0].driver} of {here[0].title} is too old for llama.cpp's builds for CUDA"
    if wishes.device == "cuda":
        raise UsageError(why, hint="Install a driver of 570 or newer, or use --option device=cpu.")
    return Build(note=f"{why} (570 is needed): it runs on the processor")


def _runs(build: str, driver: int, devices: Sequence[Device]) -> bool:
    """Whether all GPUs work with a build: by code that it has for them, or that the driver compiles."""
    with_code, compiling = _RUNS[build]
    known = [float(d.capability) for d in devices if d.capability]
    if build == "cu132" and (not known or not driver or min(known) < _OLDEST):
        return False
    if not driver or driver >= compiling:
        return True
    return driver >= with_code and bool(known) and all(number in _CODE[build] for number in known)


def _driver(device: Device) -> int:
    first = device.driver.partition(".")[0]
    return int(first) if first.isdecimal() else 0


def _nvidia(devices: Sequence[Device], among: Sequence[str] = ()) -> list[Device]:
    """Those that may be used, the emptiest first."""
    names = {f"{NVIDIA}={number}" for number in among}
    every = "all" in among or not among
    here = [d for d in devices if d.name.startswith(f"{NVIDIA}=") and (every or d.name in names)]
    return sorted(here, key=lambda d: (-d.free, d.name))


def fit(request: PlanRequest, wishes: Wishes, sizing: Mapping[str, Any], asked: int, limit: int) -> Fit | None:
    """As many layers as fit with the context that was ``asked`` for, or up to ``limit`` tokens; None: not one does.

    All of them, or OutOfMemory, unless the request would ``settle`` for less. Then a context that nobody asked for is
    made shorter for all layers to fit, down to ``SHORTEST``; else as many go as fit. UsageError for a GPU that is not
    there.
    """
    chooser = _Chooser(request, wishes, sizing, asked, limit)
    return chooser.anyhow() if not chooser.devices else chooser.whole() or chooser.less()


@dataclass(frozen=True)
class _Chooser:
    request: PlanRequest
    wishes: Wishes
    sizing: Mapping[str, Any]
    asked: int
    limit: int

    @property
    def devices(self) -> list[Device]:
        found = self.request.devices if self.wishes.device in ("auto", "cuda") else ()
        return _nvidia(found, self.wishes.gpus) or _nvidia(found)

    @property
    def layers(self) -> int:
        """How many are wanted."""
        every = Facts(self.request.metadata).number("layers") + 1
        return every if self.wishes.layers in (None, -1) else min(int(self.wishes.layers or 0), every)

    def anyhow(self) -> Fit:
        """All that was asked for: nobody knows the memory of these GPUs."""
        if self.wishes.device == "rocm":
            names, title = ("amd.com/gpu=all",), "AMD's GPU"
        elif self.wishes.device == "vulkan":
            names = (f"{NVIDIA}=all",) if _nvidia(self.request.devices) else ("intel.com/gpu=all",)
            title = "Vulkan's GPU"
        else:
            names, title = tuple(f"{NVIDIA}={gpu}" for gpu in self.wishes.gpus), "CUDA's GPU"
        context = self.asked or self.limit
        return Fit(self._parts(self.layers, 1, context), context, {}, names, title)

    def whole(self) -> Fit | None:
        """All layers that are wanted; OutOfMemory where they do not fit, and fewer will not do."""
        context = self.asked or self.limit
        every = [self._parts(self.layers, gpus, context) for gpus in self._counts()]
        found = next((parts for parts in every if self._fits(parts)), None)
        if found is None and self.request.settle:
            return None
        if found is None:  # where it would fit if nothing else were there, so that others leave for it
            total = [d.total for d in sorted(self.devices, key=lambda d: -d.total)]
            found = next((parts for parts in every if parts.gpu.total <= total[parts.gpus - 1]), every[-1])
        return self._take(found, context)

    def less(self) -> Fit | None:
        """A shorter context, or fewer layers where their number is for us to choose; None: not one fits."""
        if self.wishes.layers is not None:
            found = next((f for context in self._contexts() if (f := self._exactly(context))), None)
        else:
            found = self._full() or next((f for context in self._contexts() if (f := self._most(context))), None)
        if found is None and (self.wishes.layers is not None or self.wishes.device == "cuda"):
            least = self.layers if self.wishes.layers is not None else 2
            context = list(self._contexts())[-1]
            return self._take(self._parts(least, 1, context), context)  # refuses
        return found

    def _full(self) -> Fit | None:
        for gpus in self._counts() if not self.asked else ():
            sizes = {"free": self._share(gpus), "limit": self.limit, "memory": self.request.free_memory, "gpus": gpus}
            context = fit_full(self.request.metadata, **sizes, **self.sizing)
            if context >= min(SHORTEST, self.limit):
                return self._take(self._parts(self.layers, gpus, context), context)
        return None

    def _exactly(self, context: int) -> Fit | None:
        every = (self._parts(self.layers, gpus, context) for gpus in self._counts())
        found = next((parts for parts in every if self._fits(parts) and self._here(parts)), None)
        return self._take(found, context) if found else None

    def _most(self, context: int) -> Fit | None:
        """The number of GPUs that takes the most layers; the output alone is not worth a GPU."""
        options = {**self.sizing, "context": context}
        found = [
            fit_layers(self.request.metadata, free=self._share(n), least=2, gpus=n, **options) for n in self._counts()
        ]
        best = max((parts for parts in found if parts), key=lambda parts: (parts.layers, -parts.gpus), default=None)
        return self._take(best, context) if best and self._here(best) else None

    def _parts(self, layers: int, gpus: int, context: int) -> Offload:
        return offload(self.request.metadata, layers=layers, gpus=gpus, context=context, **self.sizing)

    def _counts(self) -> range:
        return range(1, len(self.devices) + 1)

    def _contexts(self) -> Iterator[int]:
        """Ever shorter ones, where nobody asked for one."""
        if self.asked:
            return iter((self.asked,))
        halves = (self.limit >> times for times in itertools.count())
        return itertools.takewhile(lambda tokens: tokens >= min(SMALLEST, self.limit), halves)

    def _free(self, gpus: int) -> int:
        """What each of the emptiest ones has."""
        return max(0, self.devices[gpus - 1].free)

    def _share(self, gpus: int) -> int:
        """What is filled of that, by estimates that may be a little short."""
        return int(self._free(gpus) * _MARGIN)

    def _fits(self, parts: Offload) -> bool:
        return parts.gpu.total <= self._free(parts.gpus)

    def _here(self, parts: Offload) -> bool:
        """Whether this machine has the memory for what stays."""
        return not self.request.free_memory or parts.host.total <= self.request.free_memory

    def _take(self, parts: Offload, context: int) -> Fit:
        model, devices = self.request.model, self.request.devices
        try:
            taken = take(model, devices, parts.gpu.total, count=parts.gpus, among=self.wishes.gpus)
        except OutOfMemory as exc:
            exc.hint = (
                f"{exc.hint} `--option n-gpu-layers=N` leaves layers to the processor, `--option device=cpu` all."
            )
            raise
        titles = [d.title for d in devices if d.name in taken]
        return Fit(parts, context, taken, visible(taken, ()), " and ".join(titles))
