"""The estimate for ONNX Runtime against what a real server took, recorded on x86-64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pierhead.formats.onnx_estimate import UNKNOWN_SCRATCH, estimate_onnx

SAMPLE = Path(__file__).parent.parent / "conformance" / "engines" / "onnx.json"
# Resident memory (bytes) of the server with a MiniLM of 22 million parameters after batches of eight whole contexts.
MEASURED = 439_408 << 10


def test_it_is_close_to_what_a_real_model_took_with_full_batches() -> None:
    given = json.loads(SAMPLE.read_bytes())
    (words,) = (file["size"] for file in given["files"] if file["name"] == "tokenizer.json")
    found = estimate_onnx(given["metadata"], tokens=4096, sequence=512, vocabulary=words).total
    assert MEASURED * 0.95 <= found <= MEASURED * 1.1


@pytest.mark.parametrize(
    "metadata", [{}, {"heads": "x"}, {"heads": -1, "embedding_length": 8}, {"weights_bytes": None}]
)
def test_what_is_not_known_gets_a_margin(metadata: dict[str, object]) -> None:
    assert estimate_onnx(metadata, tokens=1, sequence=1).compute == UNKNOWN_SCRATCH


def test_more_tokens_longer_texts_and_more_workers_take_more() -> None:
    facts = {"heads": 12, "embedding_length": 384, "ffn_width": 1536, "weights_bytes": 1}
    small = estimate_onnx(facts, tokens=512, sequence=128).total
    assert small < estimate_onnx(facts, tokens=1024, sequence=128).total
    assert small < estimate_onnx(facts, tokens=512, sequence=512).total
    assert small < estimate_onnx(facts, tokens=512, sequence=128, workers=2).total
