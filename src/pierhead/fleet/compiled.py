"""Folders in which engines keep what they compile for this machine's GPUs, one for each model and engine.

A model has its own, so that none finds in it what another put there.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from pierhead.engines.base import LaunchSpec, Mount
from pierhead.engines.gpus import NVIDIA
from pierhead.errors import NotFound

TARGET = "/compiled"
SIZE = 4 << 30  # bytes that CUDA keeps of what it has compiled
_PLACES = {
    "CUDA_CACHE_PATH": "cuda",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "VLLM_CACHE_ROOT": "vllm",
}


def keeping(spec: LaunchSpec, folder: Path, digest: str) -> LaunchSpec:
    """The spec with a place that outlives the replica, where it uses NVIDIA's GPUs; else unchanged."""
    if not any(device.startswith(f"{NVIDIA}=") for device in spec.devices):
        return spec
    place = folder / f"{digest.rpartition(':')[2]}-{spec.engine}"
    at = len(spec.mounts)
    env = {name: f"$(MOUNT{at})/{below}" for name, below in _PLACES.items()}
    return msgspec.structs.replace(
        spec,
        mounts=(*spec.mounts, Mount(str(place), TARGET, read_only=False)),
        env={**spec.env, **env, "CUDA_CACHE_MAXSIZE": str(SIZE)},
    )


def prepare(spec: LaunchSpec) -> None:
    """Make the folder; an engine in a container is another user, and nobody else comes this far."""
    for mount in spec.mounts:
        if mount.target == TARGET:
            Path(mount.source).mkdir(parents=True, exist_ok=True)
            Path(mount.source).parent.chmod(0o700)
            Path(mount.source).chmod(0o777)


def tidy(folder: Path, find: Callable[[str], object]) -> None:
    """Remove those of models that ``find`` does not know any more."""
    for place in folder.iterdir() if folder.is_dir() else ():
        try:
            find(f"sha256:{place.name.partition('-')[0]}")
        except NotFound:
            with contextlib.suppress(OSError):
                shutil.rmtree(place)
