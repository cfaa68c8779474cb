"""ONNX: models that its own library wrote, weights beside the file, and bytes that lie."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pierhead.errors import CorruptData, PierError
from pierhead.formats import onnx as reader
from pierhead.formats.estimate import estimate
from pierhead.formats.reading import File, run
from pierhead.formats.summarize import summarize, summarize_remote
from pierhead.store.classify import classify

from .foreign import block, initializer, number, onnx_model

pytestmark = pytest.mark.timeout(30)


def real(path: Path, *, external: bool = False, size: int = 64) -> Path:
    weights = onnx.numpy_helper.from_array(numpy.ones((size, 8), numpy.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], producer_name="tests")
    onnx.save_model(
        model,
        path,
        save_as_external_data=external,
        location=f"{path.name}_data" if external else None,
        size_threshold=0,
    )
    return path


def look(folder: Path) -> dict[str, Any]:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = [File(name, (folder / name).stat().st_size, *classify(name)) for name in names]
    return summarize(files, {name: folder / name for name in names})


def walk(data: bytes) -> reader.Model:
    return run(reader.read_model(File("m.onnx", len(data))), lambda _, offset, length: data[offset : offset + length])


@pytest.mark.parametrize("external", [False, True])
def test_inputs_outputs_and_weights_of_a_real_model_are_told(external: bool, tmp_path: Path) -> None:
    real(tmp_path / "model.onnx", external=external)

    found = look(tmp_path)

    assert (found["format"], found["producer"], found["opset"]) == ("onnx", "tests", {"": 21})
    assert found["inputs"] == [{"name": "x", "type": "float32", "shape": ["batch", 64]}]
    assert found["outputs"] == [{"name": "y", "type": "float32", "shape": ["batch", 8]}]
    assert (found["parameters"], found["weights_bytes"], found["tensor_count"]) == (512, 2048, 1)
    assert found["quantization"] == "float32"


def test_its_memory_is_the_weights_and_a_margin(tmp_path: Path) -> None:
    real(tmp_path / "model.onnx")

    need = estimate(look(tmp_path), context=2048)

    assert (need.weights, need.kv_cache) == (2048, 0)
    assert need.compute >= 64 << 20


def test_a_missing_file_of_weights_is_named(tmp_path: Path) -> None:
    real(tmp_path / "model.onnx", external=True)
    (tmp_path / "model.onnx_data").unlink()

    with pytest.raises(CorruptData, match=r"model\.onnx_data, which is missing"):
        look(tmp_path)


def test_two_graphs_make_one_model(tmp_path: Path) -> None:
    real(tmp_path / "encoder.onnx")
    real(tmp_path / "decoder.onnx", size=32)

    found = look(tmp_path)

    assert found["parameters"] == (64 + 32) * 8
    assert set(found["graphs"]) == {"encoder.onnx", "decoder.onnx"}


async def test_embedded_weights_are_stepped_over(tmp_path: Path) -> None:
    data = onnx_model(initializer("w", [1 << 20], data=bytes(4 << 20)) + initializer("v", [3], data=bytes(12)))
    asked: list[int] = []

    async def fetch(name: str, offset: int, length: int) -> bytes:
        found = data[offset : offset + length]
        asked.append(len(found))
        return found

    found = await summarize_remote([File("m.onnx", len(data), "weights", "onnx")], fetch)

    assert found["parameters"] == (1 << 20) + 3
    assert sum(asked) < 256 << 10


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (onnx_model(initializer("w", [1], location="../../etc/passwd")), "outside of its folder"),
        (onnx_model(initializer("w", [1], location="/etc/passwd")), "outside of its folder"),
        (onnx_model(initializer("w", [1 << 62, 4])), "impossible shape"),
        (onnx_model(initializer("w", [1], 99)), "unknown type"),
        (number(1, 10) + block(7, b"", claimed=1 << 40), "more than there are"),
        (number(1, 10), "no graph"),
        (block(7, b""), "no version"),
        (number(1, 10) + block(7, b"") + block(7, b""), "several graphs"),
        (number(1, 10) + b"\xff" * 12, "no end"),
        (number(1, 10) + b"\x3b", "unknown kind"),
        (number(1, 10) + b"\x00", "no field"),
        (onnx_model(block(11, bytes(70_000))), "at most"),
        (onnx_model(b"\x0a\x00" * ((1 << 20) + 1)), "nodes"),
        (onnx_model(block(5, b"\x10\x01") * 65_537), "tensors"),
    ],
)
def test_bytes_that_lie_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptData) as caught:
        walk(data)
    assert reason in caught.value.message


@given(st.binary(max_size=300))
def test_any_bytes_end_in_a_model_or_a_clear_error(data: bytes) -> None:
    for given_bytes in (
        data,
        onnx_model(data),
        onnx_model(block(5, data) + block(11, data)),
        onnx_model(b"", head=data),
    ):
        with contextlib.suppress(PierError):
            walk(given_bytes)
