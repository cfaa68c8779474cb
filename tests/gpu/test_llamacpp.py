"""llama.cpp on a real GPU: its answers, its speed beside the processor's, and what it takes of the GPU's memory."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.gpu.conftest import Gpu, named, replica
from tests.heavy.conftest import Installation

from pierhead.engines.base import Plan, PlanRequest
from pierhead.engines.llamacpp import LlamaCpp
from pierhead.errors import OutOfMemory
from pierhead.events import Ready
from pierhead.formats import gguf
from pierhead.formats.offload import CONTEXT, LIBRARIES
from pierhead.store.model import ModelFile

pytestmark = pytest.mark.timeout(300)
MIB = 1 << 20
COUNT: list[Any] = [{"role": "user", "content": "Count from one to one hundred, in words."}]
LONG = "The quick brown fox jumps over the lazy dog. "


@dataclass
class Bench:
    """Starts models and tells what they take."""

    installation: Installation
    gpu: Gpu

    def planned(self, file: Path, **settings: Any) -> Plan:
        """What the engine plans for this GPU as it is."""
        weights = (ModelFile(file.name, file.stat().st_size),)
        asked = PlanRequest("r1", "m", file.parent, weights, gguf.summary(gguf.read_file(file)), settings)
        return LlamaCpp().plan(dataclasses.replace(asked, devices=self.gpu.nvml.devices()))

    def start(self, model: str, **settings: Any) -> tuple[Ready, float]:
        begun = time.monotonic()
        ready = self.installation.start(model, engine="llamacpp", verbosity=5, **settings)
        return ready, time.monotonic() - begun

    def work(self, model: str, tokens: int, *, vectors: bool = True) -> str:
        """A long prompt, an answer, and the logits of a whole text: what makes a replica as large as it gets."""
        client = self.installation.openai
        client.completions.create(model=model, prompt=LONG * (tokens // 10), max_tokens=8)
        if vectors:
            client.embeddings.create(model=model, input=LONG * 45)
        answer = client.chat.completions.create(model=model, messages=COUNT, max_tokens=16, temperature=0)
        return answer.choices[0].message.content or ""

    def speed(self, model: str, tokens: int = 128) -> float:
        """Tokens per second of one answer."""
        return max(self._answer(model, tokens) for _ in range(2))  # the first one warms up

    def _answer(self, model: str, tokens: int) -> float:
        begun = time.monotonic()
        given: Any = {"model": model, "messages": COUNT, "max_tokens": tokens, "extra_body": {"ignore_eos": True}}
        self.installation.openai.chat.completions.create(**given)
        return tokens / (time.monotonic() - begun)

    def log(self, model: str) -> str:
        return self.installation.pier("logs", model)

    def compare(self, model: str, file: Path, **settings: Any) -> None:
        """The estimate beside what NVML tells; both are printed, with what llama.cpp says that it allocates."""
        plan = self.planned(file, **settings)
        before = self.gpu.settled()
        ready, took = self.start(model, **settings)
        try:
            self.work(model, min(ready.context, 2048) * 3 // 4, vectors=settings.get("embeddings", True))
            used, need = self.gpu.used - before, sum(plan.devices.values())
            log, found = self.log(model), replica(self.installation, model)
            told = re.findall(r"(\S+) +(model|KV|RS|compute|output) buffer size = +([\d.]+) MiB", log)
            anonymous = _anonymous(found.pid)
            print(f"\n{model} {settings}: ready in {took:.1f} s, {plan.notes}")
            print(f"  GPU: estimate {need / MIB:,.0f} MiB, used {used / MIB:,.0f} MiB, {need / used - 1:+.1%}")
            print(
                f"  host: estimate {plan.memory / MIB:,.0f} MiB, peak seen {found.memory_peak / MIB:,.0f} MiB", end=""
            )
            print(f", anonymous of its processes {anonymous / MIB:,.0f} MiB; the GPU's peak seen {found.devices_peak}")
            print("  " + ", ".join(f"{where} {what} {size}" for where, what, size in told))
            on_gpu = sum(float(size) for where, _, size in told if where.startswith("CUDA") and "Host" not in where)
            rest = used / MIB - on_gpu
            print(f"  beside its buffers on the GPU: {rest:,.0f} MiB; CONTEXT is {CONTEXT >> 20}")
            print(f"  LIBRARIES, in the host's estimate, is {LIBRARIES >> 20}")
            assert found.devices
            assert need >= used * 0.95, "the estimate is too short"
            assert need <= used * 1.10 or need - used < 64 * MIB, "the estimate is too large"
        finally:
            self.installation.stop(model)


def _anonymous(pid: int | None) -> int:
    """Anonymous memory of a process and what it started."""
    if pid is None:
        return 0
    top = psutil.Process(pid)
    return sum(p.memory_full_info().uss for p in (top, *top.children(recursive=True)))


@pytest.fixture(scope="module")
def bench(installation: Installation, gpu: Gpu) -> Bench:
    return Bench(installation, gpu)


def test_a_chat_is_answered_with_every_layer_on_the_gpu_and_faster_than_by_the_processor(bench: Bench) -> None:
    speeds: dict[str, float] = {}
    texts: dict[str, str] = {}
    for device, settings in (("cuda", {}), ("cpu", {"device": "cpu", "threads": os.cpu_count() or 1})):
        _, took = bench.start("smollm2", context=2048, **settings)
        texts[device] = bench.work("smollm2", 1024)
        speeds[device] = bench.speed("smollm2")
        found = replica(bench.installation, "smollm2")
        print(f"\n{device}: ready in {took:.1f} s, {speeds[device]:,.0f} tokens/s, claims {found.devices}")
        print(f"  {texts[device]!r}")
        assert bool(found.devices) is (device == "cuda")
        if device == "cuda":
            assert "offloaded 31/31 layers to GPU" in bench.log("smollm2")
        bench.installation.stop("smollm2")
    assert len(texts["cuda"]) > 10
    assert speeds["cuda"] > speeds["cpu"]


def test_vectors_of_the_gpu_are_those_of_the_processor(bench: Bench) -> None:
    found: list[list[float]] = []
    for settings in ({}, {"device": "cpu"}):
        bench.start("smollm2", context=1024, **settings)
        answer = bench.installation.openai.embeddings.create(model="smollm2", input="A harbour at dawn.")
        found.append(answer.data[0].embedding)
        bench.installation.stop("smollm2")
    here, there = found
    alike = sum(a * b for a, b in zip(here, there, strict=True)) / (math.hypot(*here) * math.hypot(*there))
    print(f"\ncosine of the two: {alike:.5f}")
    assert alike > 0.99


@pytest.mark.parametrize(
    "settings",
    [
        {"context": 8192},
        {"context": 2048, "parallel": 4},
        {"context": 8192, "cache_type_k": "q8_0", "cache_type_v": "q8_0"},
        {"context": 4096, "embeddings": False},
        {"context": 4096, "n_gpu_layers": 10},
    ],
    ids=["usual", "slots", "small cache", "without embeddings", "ten layers"],
)
def test_smollm2_takes_of_the_gpu_what_was_estimated(bench: Bench, smollm2: Path, settings: dict[str, Any]) -> None:
    bench.compare("smollm2", smollm2, **settings)


def test_a_larger_model_takes_of_the_gpu_what_was_estimated(bench: Bench) -> None:
    file = named("PIERHEAD_GPU_GGUF")
    bench.installation.pier("package", str(file), "large")
    bench.compare("large", file, context=8192)
    bench.compare("large", file, context=4096, n_gpu_layers=8)


def test_a_draft_shares_the_gpu(bench: Bench) -> None:
    bench.start("smollm2", context=2048, draft="smollm2")
    claims = replica(bench.installation, "smollm2").devices
    speed = bench.speed("smollm2", 64)
    print(f"\nwith itself as a draft: {speed:,.0f} tokens/s, claims {claims}")
    bench.installation.stop("smollm2")
    assert sum(claims.values()) > CONTEXT


def test_two_models_share_the_gpu_and_each_answers(bench: Bench, smollm2: Path) -> None:
    bench.installation.pier("package", str(smollm2), "second", "--context-size", "1024")
    bench.start("smollm2", context=1024)
    bench.start("second", context=1024)
    for model in ("smollm2", "second"):
        assert bench.work(model, 256)
        assert replica(bench.installation, model).devices
    for model in ("smollm2", "second"):
        bench.installation.stop(model)


def test_more_layers_than_a_claim_allows_are_refused_with_the_gpus_numbers(bench: Bench, smollm2: Path) -> None:
    """Contexts that no GPU of today holds: it is a matter of numbers, nothing is started."""
    with pytest.raises(OutOfMemory) as caught:
        bench.planned(smollm2, context=8192, parallel=4096, device="cuda")
    print(f"\n{caught.value.message}")
    assert caught.value.data["device"] == "nvidia.com/gpu=0"
