"""NVIDIA's libraries for ONNX Runtime: those of the wheels beside it, loaded before it needs them; what is amiss."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
from pathlib import Path
from typing import Any

NEEDED = {
    "cuda": ("libcuda.so.1", "libcudart.so.{0}", "libcublasLt.so.{0}", "libcublas.so.{0}", "libcurand.so.10"),
    "tensorrt": ("libcudnn.so.9", "libnvinfer.so.10", "libnvonnxparser.so.10"),
}
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def preload(ort: Any) -> None:
    """Load them, so that the execution provider finds them wherever they are installed."""
    said = io.StringIO()  # it prints what it does not find, needed or not
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()


def amiss(provider: str) -> str:
    """Why an execution provider of NVIDIA's does not work, as far as it can be seen; "" where it cannot."""
    major = _build().partition(".")[0] or "13"
    names = [name.format(major) for name in NEEDED["cuda"] + (NEEDED["tensorrt"] if provider == "tensorrt" else ())]
    missing = [name for name in names if not _loads(name)]
    if missing:
        return f"{', '.join(missing)} cannot be loaded" + (
            ": there is no driver of NVIDIA's" if missing[0] == "libcuda.so.1" else ""
        )
    code = _driver()
    if code == _NO_DEVICE:
        return "the driver sees no GPU"
    return f"the driver refuses with error {code} (its CUDA may be older than {_build()})" if code else ""


def _build() -> str:
    """The version of CUDA that this ONNX Runtime is made for."""
    with contextlib.suppress(ImportError):
        info: Any = importlib.import_module("onnxruntime.capi.build_and_package_info")
        return str(getattr(info, "cuda_version", ""))
    return ""


def _loads(name: str) -> bool:
    """Whether a library is loaded already, or can be from where the system looks."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(name)
        return True
    return any(name in line for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())


def _driver() -> int:
    """The status of CUDA's own start; 0: it works."""
    with contextlib.suppress(OSError, AttributeError):
        return int(ctypes.CDLL("libcuda.so.1").cuInit(0))
    return 0
