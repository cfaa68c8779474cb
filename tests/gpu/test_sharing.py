"""What the machine says of its GPU, and what a process in the sandbox can do with it."""

from __future__ import annotations

from tests.gpu.conftest import Gpu
from tests.heavy.conftest import Installation

GIB = 1 << 30


def test_doctor_names_the_gpu_and_its_memory(installation: Installation, gpu: Gpu) -> None:
    said = installation.pier("doctor", "--json")
    assert gpu.device.title in said


def test_the_library_tells_of_memory_driver_and_capability(gpu: Gpu) -> None:
    device = gpu.device
    print(device)  # a figure of this machine
    assert device.total > GIB
    assert 0 < device.free <= device.total
    assert float(device.capability) >= 5
    assert device.driver.split(".")[0].isdecimal()
    assert gpu.nvml.minors()["nvidia.com/gpu=0"] >= 0
