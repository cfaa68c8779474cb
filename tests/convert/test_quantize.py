"""Quantizing the real model with llama.cpp's own quantizer, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from pierhead.convert.job import Job, Progress, Workshop
from pierhead.convert.quantize import ENVIRONMENT, Wish, quantize
from pierhead.convert.types import TYPES, known
from pierhead.errors import EngineFailed, UsageError
from pierhead.events import Listener, ignore
from pierhead.formats.gguf import read_file
from pierhead.package.build import package
from pierhead.package.inputs import Input, Inputs
from pierhead.package.recipe import Recipe
from pierhead.runtimes.environment import Environments
from pierhead.store.layout import Store

from .conftest import LICENCE, ROOT, Bench

DAY = "2026-01-01T00:00:00Z"
pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]


def test_a_model_becomes_smaller_is_measured_and_answers(workbench: Bench, story: Path) -> None:
    made = json.loads(workbench.ok("quantize", "wide", "small", "--type", "q4_k_m", "--text", str(story), "--json"))
    assert made["type"] == "Q4_K_M"
    assert made["size_after"] < made["size_before"] / 2
    assert made["bits_before"] == pytest.approx(16.1, abs=0.2)
    assert 4 < made["bits_after"] < 7
    assert 1 < made["perplexity_before"] < made["perplexity_after"] * 1.2
    assert made["perplexity_tokens"] >= 256
    assert 0.5 < made["same_top"] <= 1

    record, base = workbench.store.get("small"), workbench.store.get("wide")
    assert record.annotations["org.opencontainers.image.base.digest"] == base.digest
    assert record.annotations["org.opencontainers.image.base.name"] == "wide"
    assert record.annotations["ai.pierhead.made-by"].startswith("llama-quantize Q4_K_M")
    assert record.metadata["quantization"] == "Q4_K_M"
    assert record.packaged.context == 300, "what the model was packaged with stays"
    licence = next(f for f in record.files if f.role == "license")
    assert workbench.store.blob_path(licence.digest).read_text() == LICENCE
    assert not workbench.left_over
    assert workbench.ok("run", "small", "Say hello.", "--max-tokens", "4", "--temperature", "0").strip()


def test_what_is_quantized_already_is_not_done_again_unless_asked(workbench: Bench) -> None:
    done = workbench.pier("quantize", "smollm2", "again", "--type", "Q8_0")
    assert done.returncode == 2
    assert "quantized already (Q4_1)" in done.stderr
    assert "--allow-requantize" in done.stderr


def test_importances_change_what_comes_out(workbench: Bench, tmp_path: Path) -> None:
    header = read_file(workbench.store.materialize(workbench.store.get("wide")) / "model-F16.gguf")
    rows = [(t.name, t.shape[0]) for t in header.tensors if t.name.endswith(".weight") and len(t.shape) > 1]
    data = struct.pack("<i", len(rows))
    for name, columns in rows:
        values = [0.01 + (i % 7) ** 3 for i in range(columns)]
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, columns)
        data += struct.pack(f"<{columns}f", *values)
    matrix = tmp_path / "imatrix.dat"
    matrix.write_bytes(data)
    plain = workbench.ok("quantize", "wide", "plain", "--type", "Q4_0", "--no-perplexity")
    better = workbench.ok("quantize", "wide", "better", "--type", "Q4_0", "--no-perplexity", "--imatrix", str(matrix))
    digests = [{f.digest for f in workbench.store.get(n).files if f.role == "weights"} for n in ("plain", "better")]
    assert digests[0] != digests[1]
    assert plain.splitlines()[-1] != better.splitlines()[-1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_whoever_is_ended_leaves_nothing(workbench: Bench, how: signal.Signals) -> None:
    process = subprocess.Popen(
        workbench.argv("quantize", "wide", "never", "--type", "Q4_K_M", "--threads", "1"),
        env=workbench.env,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stderr is not None
    while b"Quantizing" not in (line := process.stderr.readline()):
        assert line, "it ended before it began"
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode == 130
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not workbench.left_over
    assert "never" not in workbench.ok("list")


def test_a_model_may_lose_its_name_while_it_is_quantized(smollm2: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    licence = tmp_path / "LICENCE"
    licence.write_text(LICENCE)
    files = (Input(smollm2, "m.gguf", "weights", "gguf"), Input(licence, "LICENCE", "license"))
    base = package(store, Recipe("base", Inputs(files), created=DAY))

    class Shop(Workshop):
        async def run(self, job: Job, source: Path, target: Path, listener: Listener, tell: Progress) -> dict[str, Any]:
            await asyncio.to_thread(store.remove, "base")
            await asyncio.to_thread(store.prune)
            os.link(source / "m.gguf", target / job.told["out"])
            return {}

    shop = Shop(Environments(tmp_path), confined=False)
    wish = Wish("small", "Q4_1", DAY, allow_requantize=True)
    asyncio.run(quantize(store, shop, base, wish, ignore, lambda *_: None))
    assert [m.name for m in store.models()] == ["small"]
    assert {f.role for f in store.get("small").files} == {"weights", "license"}


def test_a_broken_file_is_refused_with_the_quantizers_reason(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + b"\xff" * 64)
    told = {"do": "quantize", "file": "m.gguf", "out": "o.gguf", "type": "Q8_0", "threads": 1, "imatrix": ""}
    told |= {"allow_requantize": False, "pure": False, "keep_output": False}
    job = Job("quantize.py", "llama-quantize", ENVIRONMENT, told)
    shop = Workshop(Environments(ROOT / ".cache" / "engines"), confined=False)
    with pytest.raises(EngineFailed, match="quantizer refused"):
        asyncio.run(shop.run(job, tmp_path, tmp_path, ignore, lambda what, share: None))


def test_types_are_known_by_name_and_close_ones_are_named() -> None:
    assert known("q4_k_m", matrix=False) == "Q4_K_M"
    with pytest.raises(UsageError, match="is not a type") as wrong:
        known("Q4KM", matrix=False)
    assert wrong.value.hint == "Did you mean Q4_K_M?"
    with pytest.raises(UsageError, match="importance matrix"):
        known("IQ2_XXS", matrix=False)
    assert known("IQ2_XXS", matrix=True) in TYPES


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--type", "Q9"), "is not a type of GGUF weights"),
        (("--imatrix", "none.dat"), "there is no file none.dat"),
        (("--text", "none.txt"), "cannot read none.txt"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(workbench: Bench, args: tuple[str, ...], said: str) -> None:
    done = workbench.pier("quantize", "wide", "x", *args)
    assert done.returncode == 2
    assert said in done.stderr
