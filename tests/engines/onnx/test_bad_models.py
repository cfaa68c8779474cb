"""Models that cannot be served: the server ends with one line that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
from onnx import TensorProto, helper

from . import models
from .conftest import Serve

pytestmark = pytest.mark.timeout(120)


def cut(folder: Path) -> None:
    file = folder / "model.onnx"
    file.write_bytes(file.read_bytes()[:200])


def another_format(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"GGUF" + bytes(1000))


def unknown_operator(folder: Path) -> None:
    models.save(
        folder,
        [helper.make_node("FlashMagic", ["input_ids"], ["logits"])],
        {},
        models.texts(),
        {"logits": (TensorProto.FLOAT, ["n", 2])},
    )


def newer(folder: Path) -> None:
    model = onnx.load(str(folder / "model.onnx"))
    model.ir_version = 99
    onnx.save_model(model, str(folder / "model.onnx"))


def no_weights(folder: Path) -> None:
    model = onnx.load(str(folder / "model.onnx"))
    model.graph.initializer[0].raw_data = numpy.zeros((4096, 2), numpy.float32).tobytes()
    model.graph.initializer[0].dims[:] = [4096, 2]
    onnx.save_model(
        model, str(folder / "model.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    (folder / "weights.bin").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 1}')


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def small_table(folder: Path) -> None:
    """A tokenizer of another model, whose tokens this one does not have."""
    models.summed(folder, numpy.zeros((2, 2), numpy.float32))


def strange_inputs(folder: Path) -> None:
    models.save(
        folder,
        [helper.make_node("Identity", ["pixels"], ["logits"])],
        {},
        {"pixels": (TensorProto.FLOAT, ["n", 2])},
        {"logits": (TensorProto.FLOAT, ["n", 2])},
    )


BAD: tuple[tuple[Callable[[Path], None], str], ...] = (
    (cut, "it is not an ONNX file, or cut"),
    (another_format, "it is not an ONNX file, or cut"),
    (unknown_operator, "it uses an operator that this ONNX Runtime does not have"),
    (newer, "it needs a newer ONNX Runtime"),
    (no_weights, "a file with its weights is missing"),
    (no_tokenizer, "there is no tokenizer.json beside the model"),
    (broken_tokenizer, "tokenizer.json cannot be used"),
    (broken_config, "config.json cannot be read"),
    (small_table, "the model cannot work on a text"),
    (strange_inputs, "the model takes pixels, which a tokenizer alone does not make; set task=tensors"),
)


@pytest.mark.parametrize(("spoil", "why"), BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_the_last_line_says_why_a_model_cannot_be_served(
    starts: Serve, tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    folder = models.classifier(tmp_path / "m")
    plan = starts.plan(folder, task="classify")
    spoil(folder)
    served = starts(folder, plan=plan)
    assert served.process.wait(60) == 1
    last = served.log.read_text().strip().splitlines()[-1]
    assert last.startswith("engine: ")
    assert why in last
    assert len(last) < 900
    assert "/src/" not in last


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"task": "tokens"}, "its output logits has 2 dimensions, so it cannot serve the task tokens"),
        ({"provider": "openvino"}, "no execution provider openvino"),
    ],
    ids=["task", "provider"],
)
def test_settings_that_do_not_go_with_the_model_are_told(
    starts: Serve, tmp_path: Path, settings: dict[str, Any], why: str
) -> None:
    served = starts(models.classifier(tmp_path / "m"), **settings)
    assert served.process.wait(60) == 1
    assert why in served.log.read_text().strip().splitlines()[-1]


def test_more_labels_than_classes_are_told(starts: Serve, tmp_path: Path) -> None:
    folder = models.classifier(tmp_path / "m")
    models.config(folder, "BertForSequenceClassification", ("A", "B", "C"))
    served = starts(folder)
    assert served.process.wait(60) == 1
    assert "config.json names 3 labels, the model has 2 classes" in served.log.read_text()


def test_a_step_that_is_not_in_the_file_is_told(starts: Serve, tmp_path: Path) -> None:
    folder = models.embedder(tmp_path / "m")
    listed = [{"type": f"sentence_transformers.models.{m}"} for m in ("Transformer", "Pooling", "Dense")]
    (folder / "modules.json").write_text(json.dumps(listed))
    served = starts(folder)
    assert served.process.wait(60) == 1
    assert "modules.json has the step Dense" in served.log.read_text()
