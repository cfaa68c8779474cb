"""vLLM on CUDA as a sandboxed process: it answers, takes what was claimed, sleeps, and shares the GPU with another."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.gpu import random_llama
from tests.gpu.conftest import MIB, Gpu, replica
from tests.heavy.conftest import Installation

pytestmark = pytest.mark.timeout(420)
HI: list[Any] = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that an environment variable names, else one of random weights."""
    if named := os.environ.get("PIERHEAD_GPU_MODEL"):
        return Path(named)
    return random_llama.make(tmp_path_factory.mktemp("llama") / "llama", random_llama.LARGE)


@pytest.fixture(scope="module")
def packaged(installation: Installation, writer: Path) -> Installation:
    for name in ("first", "second"):
        installation.pier("package", "--safetensors-dir", str(writer), name)
    return installation


@pytest.fixture(scope="module")
def first(packaged: Installation, gpu: Gpu) -> Iterator[tuple[int, str]]:
    """vLLM with nothing said but that it may sleep: what others use of the GPU, and its socket."""
    others, began = gpu.settled(), time.monotonic()
    ready = packaged.start("first", engine="vllm", enable_sleep_mode=True)
    print(f"\nvLLM: ready after {time.monotonic() - began:.1f} s")
    yield others, ready.socket
    packaged.stop("first")


def say(installation: Installation, model: str, tokens: int = 16, text: str = "Say hello.") -> int:
    """The tokens of an answer."""
    messages: list[Any] = [{"role": "user", "content": text}]
    answer = installation.openai.chat.completions.create(
        model=model, messages=messages, max_tokens=tokens, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    return answer.usage.completion_tokens


def claimed(installation: Installation, model: str) -> int:
    """Bytes of the GPU that its plan claims."""
    (claim,) = replica(installation, model).devices.values()
    return claim


def test_it_answers_takes_what_was_claimed_and_gives_it_back_while_it_sleeps(
    packaged: Installation, gpu: Gpu, first: tuple[int, str]
) -> None:
    others, socket = first
    assert say(packaged, "first") == 16
    info = replica(packaged, "first")
    claim = claimed(packaged, "first")
    idle = gpu.settled() - others
    with ThreadPoolExecutor(32) as many:
        began = time.monotonic()
        asked = [many.submit(say, packaged, "first", 128, "word " * 300) for _ in range(64)]
        counts = [one.result() for one in asked]
        took = time.monotonic() - began
    used = gpu.settled() - others
    print(f"vLLM: claims {claim / MIB:,.0f} MiB; idle {idle / MIB:,.0f}, worked {used / MIB:,.0f} MiB by NVML")
    print(f"vLLM: {sum(counts) / took:,.0f} tokens/s for 32 at a time; sandbox {info.sandbox}, {info.parallel} slots")
    print(f"vLLM: host claim {info.memory_estimate / MIB:,.0f} MiB, peak {info.memory_peak / MIB:,.0f} MiB")
    sleeps(socket, packaged, gpu, others)
    assert claim * 1.05 >= used, "it took more than was claimed"
    assert claim <= used * 1.15, "more was claimed than it takes"


def sleeps(socket: str, packaged: Installation, gpu: Gpu, others: int) -> None:
    """Most of the memory is free while it sleeps, and it answers when it has woken."""
    awake = gpu.used - others
    with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://engine", timeout=120) as engine:
        began = time.monotonic()
        assert engine.post("/sleep", params={"level": "1"}).status_code == 200
        down, asleep = time.monotonic() - began, gpu.settled() - others
        began = time.monotonic()
        assert engine.post("/wake_up").status_code == 200
        up = time.monotonic() - began
    print(f"vLLM: asleep {asleep / MIB:,.0f} of {awake / MIB:,.0f} MiB; to sleep {down:.2f} s, awake {up:.2f} s")
    assert say(packaged, "first") == 16
    assert asleep < awake / 2


def test_two_share_the_gpu(packaged: Installation, gpu: Gpu, first: tuple[int, str]) -> None:
    others, _ = first
    began = time.monotonic()
    packaged.start("second", engine="vllm", parallel=8, context=2048, cache_tokens=16384)
    print(f"\nvLLM: the second is ready after {time.monotonic() - began:.1f} s")
    assert say(packaged, "first") == say(packaged, "second") == 16
    both = claimed(packaged, "first") + claimed(packaged, "second")
    used = gpu.settled() - others
    print(f"vLLM: both claim {both / MIB:,.0f} MiB and use {used / MIB:,.0f}")
    packaged.stop("second")
    assert used <= both * 1.05
