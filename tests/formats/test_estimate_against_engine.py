"""The estimate beside what the real llama.cpp says that it allocates."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pierhead.formats import gguf
from pierhead.formats.estimate import estimate

from . import architectures

BENCH = Path(__file__).resolve().parents[2] / "bench" / "estimate.py"
MIB = 1 << 20


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_estimate", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def agree(bench: ModuleType, model: Path, options: dict[str, Any]) -> None:
    guess = estimate(gguf.summary(gguf.read_file(model)), **options)
    real = bench.measure(model, options)
    assert guess.kv_cache == pytest.approx(real["kv_cache"], abs=0.03 * MIB)  # the log rounds to 0.01 MiB
    assert guess.compute == pytest.approx(real["compute"], rel=0.1)


@pytest.mark.parametrize("name", architectures.MODELS)
def test_an_architecture_takes_what_was_estimated(name: str, bench: ModuleType, tmp_path: Path) -> None:
    model = architectures.write(tmp_path / "model.gguf", architectures.MODELS[name]())
    agree(bench, model, bench.case(4096, 2))


@pytest.mark.model
@pytest.mark.parametrize("index", range(3))
def test_smollm2_takes_what_was_estimated(index: int, bench: ModuleType, smollm2: Path) -> None:
    agree(bench, smollm2, bench.QUICK[index])


@pytest.mark.parametrize("name", ["llama with wide attention", "gemma2 with windows"])
def test_without_flash_attention_the_scores_are_counted(name: str, bench: ModuleType, tmp_path: Path) -> None:
    model = architectures.write(tmp_path / "model.gguf", architectures.MODELS[name]())
    agree(bench, model, {**bench.case(8192), "flash_attention": False})
