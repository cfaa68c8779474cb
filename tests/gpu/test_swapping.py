"""Two models that do not fit on the GPU together: who is asked for gets it, by the other's sleep or by its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.daemon.conftest import stocked  # noqa: F401  # a fixture
from tests.gpu import random_llama
from tests.gpu.conftest import MIB, Gpu, replica
from tests.heavy.conftest import Installation, installed

pytestmark = pytest.mark.timeout(420)
SETTINGS: dict[str, Any] = {"engine": "vllm", "context": 1024, "parallel": 4, "enable_sleep_mode": True}


@pytest.fixture(scope="module")
def crowded(gpu: Gpu, stocked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:  # noqa: F811
    """A daemon whose budget of the GPU holds one of the models ``first`` and ``second``."""
    folder = random_llama.make(tmp_path_factory.mktemp("llama") / "llama", random_llama.LARGE)
    with installed(stocked, '[fleet]\ngpu_budget = "5GiB"\nshrink = "never"\n') as made:
        for name in ("first", "second"):
            made.pier("package", "--safetensors-dir", str(folder), name)
        yield made


def ask(installation: Installation, model: str) -> float:
    """Seconds until the first token."""
    began = time.monotonic()
    stream = installation.openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=4, stream=True
    )
    for _ in stream:
        return time.monotonic() - began
    raise AssertionError("nothing came")


def test_who_is_asked_for_wakes_while_the_other_falls_asleep(crowded: Installation, gpu: Gpu) -> None:
    starts: list[float] = []
    for name in ("first", "second"):
        began = time.monotonic()
        crowded.start(name, **SETTINGS)
        ask(crowded, name)
        starts.append(time.monotonic() - began)
    assert replica(crowded, "first").state == "sleeping"
    swaps = [ask(crowded, name) for name in ("first", "second", "first")]
    claims = {name: sum(replica(crowded, name).devices.values()) // MIB for name in ("first", "second")}
    print(f"\nstarts {starts} s, swaps by sleep {swaps} s, claims {claims} MiB, used {gpu.used // MIB} MiB")
    assert (replica(crowded, "first").state, replica(crowded, "second").state) == ("ready", "sleeping")
    assert max(swaps) < min(starts)
    crowded.stop("second")
    crowded.stop("first")
    began = time.monotonic()
    crowded.start("first", **SETTINGS)
    print(f"started again, with what was compiled before: {time.monotonic() - began:.1f} s")


def test_a_model_of_another_engine_takes_its_place(crowded: Installation, gpu: Gpu) -> None:
    """SmolLM2 on llama.cpp needs so little that it fits beside one that sleeps."""
    crowded.start("smollm2", engine="llamacpp", context=1024)
    print(f"\nllama.cpp beside them: first token after {ask(crowded, 'smollm2'):.2f} s, used {gpu.used // MIB} MiB")
    assert replica(crowded, "smollm2").devices
