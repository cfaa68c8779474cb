"""GPUs as NVIDIA's library tells of them, the files that lead to them, and machines that have none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pierhead.engines.builds import Gpu
from pierhead.engines.gpus import Device, take, visible
from pierhead.errors import OutOfMemory, RuntimeUnavailable, UsageError
from pierhead.runtimes import devices, sandbox
from pierhead.runtimes.gpu import NVML, Nvml, read_gpus

GIB = 1 << 30


class Library:
    """Two GPUs in the words of NVIDIA's own Python module; the second breaks when it is told to."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *, driver: bool = True) -> None:
        self.driver, self.broken, self.opened = driver, False, 0

    def nvmlInit(self) -> None:
        self.opened += 1
        if not self.driver:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if handle and self.broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(total=80 * GIB, free=70 * GIB)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (9, 0)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetMinorNumber(self, handle: int) -> int:
        return 1 - handle

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        if handle and self.broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return [SimpleNamespace(pid=7, usedGpuMemory=GIB), SimpleNamespace(pid=8 + handle, usedGpuMemory=None)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=6, usedGpuMemory=GIB)] if not handle else []


def test_each_gpu_is_told_with_what_is_free_and_who_uses_it() -> None:
    library = Library()
    nvml = Nvml(lambda: library)
    first, second = nvml.devices()
    assert first == Device(
        name="nvidia.com/gpu=0",
        title="NVIDIA H100 80GB HBM3",
        total=80 * GIB,
        free=70 * GIB,
        capability="9.0",
        driver="580.65.06",
    )
    assert second.name == "nvidia.com/gpu=1"
    assert nvml.uses() == {
        6: {"nvidia.com/gpu=0": GIB},
        7: {"nvidia.com/gpu=0": GIB, "nvidia.com/gpu=1": GIB},
        8: {"nvidia.com/gpu=0": 0},
        9: {"nvidia.com/gpu=1": 0},
    }
    assert nvml.minors() == {"nvidia.com/gpu=0": 1, "nvidia.com/gpu=1": 0}
    assert read_gpus(nvml) == (Gpu("NVIDIA H100 80GB HBM3", "580.65.06", "9.0"),) * 2
    assert library.opened == 1


def test_a_gpu_that_is_lost_takes_no_other_with_it() -> None:
    library = Library()
    library.broken = True
    nvml = Nvml(lambda: library)
    assert [d.name for d in nvml.devices()] == ["nvidia.com/gpu=0"]
    assert set(nvml.uses()) == {6, 7, 8}


def test_a_machine_without_nvidias_driver_has_none_and_is_told_so() -> None:
    library = Library(driver=False)
    nvml = Nvml(lambda: library)
    assert (nvml.devices(), nvml.uses(), nvml.minors()) == ((), {}, {})
    with pytest.raises(RuntimeUnavailable, match="NVML Shared Library Not Found"):
        read_gpus(nvml)
    assert library.opened == 1  # not looked for again and again


def test_the_real_library_is_asked_and_its_absence_is_no_error() -> None:
    assert all(d.total >= d.free > 0 and d.driver for d in NVML.devices())


def test_a_process_gets_the_files_of_its_own_gpus_only(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "kfd", "null"):
        (tmp_path / name).touch()
    (tmp_path / "dri").mkdir()

    def given(*names: str, **minors: int) -> list[str]:
        numbers = {f"nvidia.com/gpu={n[1:]}": minor for n, minor in minors.items()}
        return sorted(Path(p).name for p in devices.files(names, numbers, tmp_path))

    assert given("nvidia.com/gpu=0") == ["nvidia-uvm", "nvidia0", "nvidiactl"]
    assert given("nvidia.com/gpu=0", n0=1) == ["nvidia-uvm", "nvidia1", "nvidiactl"]
    assert given("nvidia.com/gpu=all") == ["nvidia-uvm", "nvidia0", "nvidia1", "nvidiactl"]
    assert given("intel.com/gpu=all") == ["dri"]
    assert given("amd.com/gpu=all") == ["dri", "kfd"]
    assert given("vendor.example/thing=../null", "nvidia.com/gpu=../null") == ["nvidia-uvm", "nvidiactl"]
    assert given() == []
    assert devices.visible(("nvidia.com/gpu=1", "nvidia.com/gpu=3"))["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert devices.visible(("nvidia.com/gpu=all",)) == devices.visible(("intel.com/gpu=all",)) == {}


@pytest.mark.skipif(not sandbox.bwrap_works(), reason="bubblewrap does not work here")
def test_a_sandbox_shows_the_devices_it_was_given_and_no_others(tmp_path: Path) -> None:
    own = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"}
    found = sorted(p for p in Path("/dev").iterdir() if p.is_char_device() and p.name not in own)
    if not found:
        pytest.skip("this machine shows no device besides those that every sandbox has")
    (tmp_path / "s").mkdir()

    def seen(folder: str, *given: str) -> set[str]:
        argv = sandbox.bwrap(
            ("/bin/ls", "-1", folder), {}, model_dir=str(tmp_path), entry="", sockets=str(tmp_path / "s"),
            devices=given,
        )  # fmt: skip
        return set(subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout.split())

    file = found[0]
    assert seen("/dev", str(file)) - seen("/dev") == {file.name}
    assert "class" in seen("/sys", str(file))
    assert "class" not in seen("/sys")
    assert file.exists()


@pytest.mark.skipif(not sandbox.bwrap_works(), reason="bubblewrap does not work here")
def test_a_program_in_a_sandbox_has_a_name_though_its_number_is_in_no_list(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    asked = (sys.executable, "-I", "-c", "import getpass; print(getpass.getuser())")
    argv = sandbox.bwrap(asked, {}, model_dir=str(tmp_path), entry="", sockets=str(tmp_path / "s"))
    assert subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout.split() == ["engine"]


H100 = tuple(
    Device(name=f"nvidia.com/gpu={n}", title="H100", total=80 * GIB, free=free * GIB) for n, free in enumerate((10, 60))
)


def test_the_gpus_with_the_most_free_memory_are_taken() -> None:
    assert take("m", H100, GIB) == {"nvidia.com/gpu=1": GIB}
    assert take("m", H100, GIB, count=2) == {"nvidia.com/gpu=0": GIB, "nvidia.com/gpu=1": GIB}
    assert take("m", H100, GIB, among=("0",)) == {"nvidia.com/gpu=0": GIB}
    assert take("m", H100, GIB, among=("all",)) == {"nvidia.com/gpu=1": GIB}
    assert take("m", (), GIB) == {}
    assert visible({}, ("nvidia.com/gpu=all",)) == ("nvidia.com/gpu=all",)
    assert visible(take("m", H100, 1), ("x",)) == ("nvidia.com/gpu=1",)
    with pytest.raises(OutOfMemory, match=r"10,240 MiB are free on nvidia\.com/gpu=0"):
        take("m", H100, 20 * GIB, count=2)
    for wrong in ({"among": ("7",)}, {"count": 3}, {"among": ("1",), "count": 2}):
        with pytest.raises(UsageError, match="this machine has: 0, 1"):
            take("m", H100, GIB, **wrong)  # type: ignore[arg-type]
