"""Which flags of ``pier run`` a model can use, and that it refuses the others."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pierhead.cli.request import Request
from pierhead.cli.run import check_flags
from pierhead.errors import UsageError
from pierhead.store.layout import Store
from pierhead.store.media import FILE
from pierhead.store.model import Layer, ModelFile, ModelRecord

Pier = Callable[..., subprocess.CompletedProcess[str]]
NOTHING: dict[str, Any] = dict.fromkeys(
    ("system", "temperature", "top_p", "max_tokens", "seed", "think", "shape", "output", "context", "keep_alive")
) | {"files": (), "images": (), "options": ()}


def record(*, weights: str = "gguf", **metadata: Any) -> ModelRecord:
    file = ModelFile(name="weights", size=1, format=weights)
    return ModelRecord(name="m", names=(), digest="", size=1, created="", files=(file,), metadata=metadata)


CHATS = record()
HEARS = record(weights="ggml")
PAINTS = record(type="diffusion")
PREDICTS = record(weights="python", format="python", python={"methods": ["predict"]})


@pytest.mark.parametrize(
    ("model", "given", "flags"),
    [
        (CHATS, {"output": "x.png"}, "--output"),
        (HEARS, {"files": ("a.wav",), "system": "x", "output": "x.png"}, "--system, --output"),
        (PAINTS, {"system": "x", "temperature": 0.0, "files": ("a.txt",)}, "--system, --file, --temperature"),
        (PREDICTS, {"think": False, "shape": "json"}, "--think, --format"),
    ],
)
def test_a_flag_that_means_nothing_to_the_model_is_refused(
    model: ModelRecord, given: dict[str, Any], flags: str
) -> None:
    with pytest.raises(UsageError, match=flags):
        check_flags(model, Request("m", NOTHING | given))


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (CHATS, {"system": "x", "temperature": 0.0, "files": ("a.txt",), "think": False}),
        (HEARS, {"files": ("a.wav",)}),
        (PAINTS, {"images": ("a.png",), "seed": 0, "output": "x.png"}),
        (PREDICTS, {}),
    ],
)
def test_a_flag_that_means_something_is_taken(model: ModelRecord, given: dict[str, Any]) -> None:
    check_flags(model, Request("m", NOTHING | given))


def test_a_python_model_refuses_what_a_chat_would_take_before_it_is_started(bare: Pier, tmp_path: Path) -> None:
    file = tmp_path / "raiser.py"
    file.write_text("class Raiser:\n    def predict(self, x: int) -> int:\n        return x\n")
    done = bare("run", str(file), '{"x": 1}', "--system", "foo", "--temperature", "2", "-o", "x.png")
    assert done.returncode == 2, done.stderr
    assert "--system, --temperature, --output would change nothing" in done.stderr
    assert "Nothing runs" in bare("ps").stderr


def test_a_model_that_hears_asks_for_a_file_and_no_prompt(bare: Pier, tmp_path: Path) -> None:
    file = tmp_path / "ggml-tiny.bin"
    file.write_bytes(b"lmgg")
    store = Store.open(tmp_path / "home" / "state" / "store")
    blob = store.adopt_file(file)
    store.commit_model("hears", layers=[Layer(blob.digest, blob.size, FILE, "ggml-tiny.bin")], metadata={})
    done = bare("run", "hears")
    assert "pier run hears --file speech.wav" in done.stderr
    assert done.returncode == 2
