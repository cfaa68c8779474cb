"""stable-diffusion.cpp with Vulkan on the GPU: a picture comes, and the weights are in the GPU's memory."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import pytest
from tests.engines import tiny_pictures
from tests.gpu.conftest import MIB, Gpu, replica
from tests.heavy.conftest import Installation

pytestmark = pytest.mark.timeout(240)


def test_a_picture_is_painted_on_the_gpu(installation: Installation, gpu: Gpu, tmp_path: Path) -> None:
    installation.pier("package", str(tiny_pictures.model(tmp_path / "tiny")), "art")
    others, began = gpu.settled(), time.monotonic()
    installation.start("art", device="vulkan", width=64, height=64, steps=2, max_pixels=256 * 256)
    print(f"\npictures: ready after {time.monotonic() - began:.1f} s")
    answer = installation.openai.images.generate(model="art", prompt="a boat")
    used, (claim,) = gpu.settled() - others, replica(installation, "art").devices.values()
    print(f"pictures: claims {claim / MIB:,.0f} MiB of the GPU and uses {used / MIB:,.0f} by NVML")
    installation.stop("art")
    assert answer.data
    assert base64.b64decode(answer.data[0].b64_json or "").startswith(b"\x89PNG")
    assert 64 * MIB < used <= claim * 1.05
