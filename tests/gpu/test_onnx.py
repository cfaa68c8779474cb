"""The ONNX engine on CUDA as a sandboxed process: the same answers as on the processor, within what was claimed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.gpu.conftest import MIB, Gpu, replica
from tests.heavy.conftest import Installation

pytestmark = pytest.mark.timeout(300)
WIDTH, LAYERS = 1024, 24


def deep(folder: Path) -> Path:
    """A net of 24 products of matrices with random weights, 96 MiB."""
    folder.mkdir()
    dice = numpy.random.default_rng(1)
    nodes, weights, last = list[onnx.NodeProto](), list[onnx.TensorProto](), "x"
    for layer in range(LAYERS):
        matrix = dice.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(numpy.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"m{layer}"]))
        last = f"t{layer}" if layer < LAYERS - 1 else "y"
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [last]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", WIDTH]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "deep", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, str(folder / "model.onnx"))
    return folder


def test_it_gives_the_processors_answers_within_what_was_claimed(
    installation: Installation, gpu: Gpu, tmp_path: Path
) -> None:
    installation.pier("package", str(deep(tmp_path / "deep")), "deep")
    rows = numpy.random.default_rng(2).normal(size=(32, WIDTH)).round(4).tolist()

    def ask(_: int = 0) -> Any:
        answer: Any = installation.openai.post(
            "/predict", body={"model": "deep", "inputs": {"x": rows}}, cast_to=object
        )
        return answer["outputs"]["y"]

    installation.start("deep", engine="onnx", device="cpu")
    expected = numpy.array(ask())
    installation.stop("deep")

    others, began = gpu.settled(), time.monotonic()
    installation.start("deep", engine="onnx", device="cuda")
    print(f"\nONNX: ready after {time.monotonic() - began:.1f} s")
    found = numpy.array(ask())
    with ThreadPoolExecutor(8) as many:
        list(many.map(ask, range(64)))
    used, info = gpu.settled() - others, replica(installation, "deep")
    (claim,) = info.devices.values()
    print(f"ONNX: claims {claim / MIB:,.0f} MiB of the GPU and uses {used / MIB:,.0f} by NVML")
    print(f"ONNX: host claim {info.memory_estimate / MIB:,.0f} MiB, peak {info.memory_peak / MIB:,.0f} MiB")
    installation.stop("deep")
    numpy.testing.assert_allclose(found, expected, atol=2e-2)
    assert 200 * MIB < used <= claim * 1.05, "it runs on the GPU, and takes no more than was claimed"
