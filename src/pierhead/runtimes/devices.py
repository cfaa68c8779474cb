"""The files by which a process reaches the accelerators that it is given by their CDI names; opens none."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

from pierhead.engines.gpus import NVIDIA
from pierhead.errors import SourceUnavailable

_SHARED = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia-caps")
_RENDERERS = {"intel.com/gpu": ("dri",), "amd.com/gpu": ("dri", "kfd")}


def files(names: Sequence[str], minors: Mapping[str, int], dev: Path = Path("/dev")) -> list[str]:
    """Those that are there; ``minors`` are the numbers of NVIDIA's device files by CDI name."""
    return [str(dev / name) for name in dict.fromkeys(_files(names, minors, dev)) if (dev / name).exists()]


def _files(names: Sequence[str], minors: Mapping[str, int], dev: Path) -> Iterator[str]:
    for name in names:
        kind, _, number = name.partition("=")
        if kind != NVIDIA:
            yield from _RENDERERS.get(kind, ())
            continue
        if number == "all":
            yield from sorted(p.name for p in dev.glob("nvidia[0-9]*"))
        elif number.isdecimal():
            yield f"nvidia{minors.get(name, int(number))}"
        yield from _SHARED


def visible(names: Sequence[str]) -> dict[str, str]:
    """The environment by which CUDA keeps to its GPUs where all device files can be seen."""
    numbers = [name.partition("=")[2] for name in names if name.startswith(f"{NVIDIA}=")]
    if not numbers or "all" in numbers:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(numbers)}


@contextlib.contextmanager
def wanting(names: Sequence[str]) -> Generator[None]:
    """Whoever cannot get an engine's packages for a GPU is told how to do without one."""
    try:
        yield
    except SourceUnavailable as exc:
        if names:
            exc.hint = f"{exc.hint or ''} Without the GPU: `--option device=cpu`.".strip()
        raise
