"""What cannot be converted is said before anything is installed; the conversions themselves are in tests/heavy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from pierhead.convert.convert import trained_for
from pierhead.errors import UsageError

from .conftest import Bench


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as transformers writes it, of no use."""
    import numpy

    save_file({"a": numpy.zeros((2, 2), dtype=numpy.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    return tmp_path


@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("BertForSequenceClassification", "text-classification"),
        ("RobertaForTokenClassification", "token-classification"),
        ("LlamaForCausalLM", "text-generation-with-past"),
    ],
)
def test_a_models_head_tells_its_task(tmp_path: Path, head: str, task: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [head]}))
    assert trained_for(tmp_path) == task


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": [[]]}', '{"architectures": ["Strange"]}', "null"])
def test_a_config_that_tells_no_task_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError):
        trained_for(tmp_path)


def test_gguf_is_no_source(workbench: Bench) -> None:
    done = workbench.pier("convert", "wide", "x", "--to", "onnx")
    assert done.returncode == 2
    assert "is not in safetensors but in gguf" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--to", "gguf", "--type", "Q4_K_M"), "no converting to Q4_K_M at once"),
        (("--to", "onnx", "--task", "cooking"), "no exporting for 'cooking'"),
    ],
)
def test_what_is_not_made_is_said(workbench: Bench, folder: Path, args: tuple[str, ...], said: str) -> None:
    done = workbench.pier("convert", str(folder), "x", *args)
    assert done.returncode == 2
    assert said in done.stderr
    assert not workbench.left_over


def test_a_folder_without_config_is_refused(workbench: Bench, folder: Path) -> None:
    (folder / "config.json").unlink()
    done = workbench.pier("convert", str(folder), "x", "--to", "gguf")
    assert done.returncode == 2
    assert "has no config.json" in done.stderr
