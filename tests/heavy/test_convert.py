"""Real conversions: SmolLM2 in safetensors becomes GGUF, MiniLM becomes ONNX, and models that are not known."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.heavy.conftest import PIER, Installation

from pierhead.store.layout import Store

pytestmark = pytest.mark.timeout(1500)
LONG = 1200.0


@pytest.fixture
def safe(smollm2_safetensors: Path, tmp_path: Path) -> Path:
    """SmolLM2 in safetensors, without the GGUF file that some releases of transformers call its tokenizer."""
    target = tmp_path / "safe"
    target.mkdir()
    for file in smollm2_safetensors.iterdir():
        if file.name != "tokenizer.model":
            os.link(file, target / file.name)
    (target / "LICENSE").write_text("Apache-2.0\n")
    return target


def made(installation: Installation, *args: str) -> dict[str, Any]:
    return json.loads(installation.pier("convert", *args, "--json", timeout=LONG))


def cosine(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True)) / (math.hypot(*left) * math.hypot(*right))


def test_safetensors_become_gguf_that_answers_and_can_be_quantized(installation: Installation, safe: Path) -> None:
    installation.pier("package", "--safetensors-dir", str(safe), "safe")
    found = made(installation, "safe", "wide", "--to", "gguf", "--type", "f16")
    assert found["format"] == "gguf"
    assert found["type"] == "F16"
    assert found["size_after"] == pytest.approx(found["size_before"], rel=0.05)
    store = Store.open(installation.house.paths.store)
    record, base = store.get("wide"), store.get("safe")
    assert record.annotations["org.opencontainers.image.base.digest"] == base.digest
    assert [f.role for f in record.files] == ["weights", "license"]
    assert record.metadata["architecture"] == "llama"
    assert record.metadata["chat_template"]

    answer = installation.pier(
        "run", "wide", "What is the capital of France?", "--max-tokens", "12", "--temperature", "0"
    )
    assert "Paris" in answer
    smaller = json.loads(installation.pier("quantize", "wide", "small", "--type", "Q8_0", "--json", timeout=LONG))
    assert smaller["size_after"] < 0.6 * found["size_after"]
    assert smaller["perplexity_after"] == pytest.approx(smaller["perplexity_before"], rel=0.02)
    assert not [p.name for p in installation.house.paths.store.iterdir() if p.name.startswith((".convert", ".quant"))]


def test_bert_becomes_onnx_with_the_same_numbers(installation: Installation, minilm: Path) -> None:
    found = made(installation, str(minilm), "minilm", "--to", "onnx")
    assert found["task"] == "feature-extraction"
    assert found["difference"] < 1e-4
    record = Store.open(installation.house.paths.store).get("minilm")
    names = {f.name for f in record.laid_out}
    assert {"model.onnx", "tokenizer.json", "config.json", "1_Pooling/config.json"} <= names
    assert record.annotations["ai.pierhead.made-by"].startswith("optimum-onnx")

    texts = ["A kitten sleeps on the rug.", "A small cat rests on a carpet.", "Shares fell after the bank's report."]
    cat, kitten, money = (e.embedding for e in installation.openai.embeddings.create(model="minilm", input=texts).data)
    assert cosine(cat, kitten) > 0.5 > cosine(cat, money)


def test_an_architecture_that_is_not_known_is_refused_in_one_line(installation: Installation, safe: Path) -> None:
    config = json.loads((safe / "config.json").read_text())
    for name in ("gguf", "onnx"):
        folder = safe.parent / name
        shutil.copytree(safe, folder)
        (folder / "config.json").write_text(
            json.dumps(config | {"architectures": ["StrangeForCausalLM"], "model_type": "strange"})
        )
        argv = [PIER, "convert", str(folder), "never", "--to", name]
        done = subprocess.run(
            argv, env=installation.house.env, capture_output=True, text=True, timeout=LONG, check=False
        )
        assert done.returncode == 11
        first = done.stderr[done.stderr.index("Error:") :].splitlines()[0]
        assert "refused" in first
        assert "strange" in first.lower()
        assert "Traceback" not in done.stdout
