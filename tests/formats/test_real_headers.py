"""The reader and the estimate against the real SmolLM2."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from pierhead.formats import gguf
from pierhead.formats.estimate import estimate, fit_context

MIB = 1 << 20


@pytest.mark.model
def test_the_summary_of_smollm2_tells_what_its_model_card_says(smollm2: Path) -> None:
    found = gguf.summary(gguf.read_file(smollm2))
    assert found["architecture"] == "llama"
    assert found["parameters"] == 134_515_008
    assert found["quantization"] == "Q4_1"
    assert found["context_length"] == 8192
    assert (found["layers"], found["heads"], found["heads_kv"]) == (30, 9, 3)
    assert found["vocab_size"] == 49152
    assert "im_start" in found["chat_template"]
    assert len(json.dumps(found)) < 8192


@pytest.mark.model
def test_the_kv_cache_estimate_of_smollm2_is_what_llama_cpp_logged(smollm2: Path) -> None:
    found = gguf.summary(gguf.read_file(smollm2))
    assert estimate(found, context=1024, parallel=2).kv_cache == 45 * MIB


@pytest.mark.model
def test_a_remote_read_of_smollm2_fetches_little_and_finds_the_same(smollm2: Path) -> None:
    fetched: list[int] = []

    async def fetch(offset: int, length: int) -> bytes:
        with smollm2.open("rb") as file:
            file.seek(offset)
            fetched.append(length)
            return file.read(length)

    remote = asyncio.run(gguf.read_remote(fetch, smollm2.stat().st_size))
    assert remote == gguf.read_file(smollm2)
    assert sum(fetched) < 4 * MIB


@pytest.mark.model
def test_the_fitting_context_is_the_largest_that_fits(smollm2: Path) -> None:
    found = gguf.summary(gguf.read_file(smollm2))
    free = 200 * MIB
    context = fit_context(found, free=free, limit=8192)
    assert context % 256 == 0
    assert estimate(found, context=context).total <= free < estimate(found, context=context + 256).total
    assert fit_context(found, free=MIB, limit=8192) == 0
