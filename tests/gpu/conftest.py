"""Tests of engines on an NVIDIA GPU: ``make test-gpu`` runs them; a machine without one skips them and says so.

Environments are installed where they are missing. ``PIERHEAD_GPU_MODEL`` (a folder of Hugging Face's) and
``PIERHEAD_GPU_GGUF`` (a file) may name larger models, whose memory is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.daemon.conftest import stocked  # noqa: F401  # a fixture
from tests.heavy.conftest import Installation, installed

from pierhead.engines.gpus import Device
from pierhead.fleet.info import ReplicaInfo
from pierhead.runtimes.gpu import Nvml

HERE = Path(__file__).parent
MIB = 1 << 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a GPU."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


@dataclass(frozen=True)
class Gpu:
    """The first GPU of this machine."""

    nvml: Nvml

    @property
    def device(self) -> Device:
        return self.nvml.devices()[0]

    @property
    def used(self) -> int:
        """Bytes that anybody uses of it now."""
        return self.device.total - self.device.free

    def settled(self, timeout: float = 20.0) -> int:
        """The bytes in use once what has just ended has given back its own."""
        last, end = self.used, time.monotonic() + timeout
        while time.monotonic() < end:
            time.sleep(0.5)
            now = self.used
            if abs(now - last) < 8 * MIB:
                return now
            last = now
        return last


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    nvml = Nvml()
    if not nvml.devices():
        pytest.skip("needs an NVIDIA GPU")
    return Gpu(nvml)


@pytest.fixture(scope="module")
def installation(gpu: Gpu, stocked: Path) -> Iterator[Installation]:  # noqa: F811
    """A daemon on a machine with a GPU; SmolLM2 as GGUF is in its store as ``smollm2``."""
    with installed(stocked) as made:
        yield made


def replica(installation: Installation, model: str) -> ReplicaInfo:
    """The only replica of a model, as ``pier ps --json`` tells of it."""
    import msgspec

    found = msgspec.json.decode(installation.pier("ps", "--json"), type=list[ReplicaInfo])
    (only,) = [r for r in found if r.model == model or r.model.startswith(f"{model}:")]
    return only


def named(variable: str) -> Path:
    """The model that an environment variable names; skipped where it names none."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no model")
    return Path(os.environ[variable])
