"""The estimate for ONNX Runtime against what a real server took, recorded on x86-64."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from pierhead.formats.onnx_estimate import UNKNOWN_SCRATCH, estimate_onnx

MIB = 1 << 20
MINILM = {"heads": 12, "embedding_length": 384, "ffn_width": 1536}
FLOATS = MINILM | {"weights_bytes": 91_000_000, "dtypes": {"float32": 91_000_000}}
INTEGERS = MINILM | {"weights_bytes": 23_000_000, "dtypes": {"int8": 22_600_000, "float32": 400_000}}
WIDE = {"heads": 12, "embedding_length": 768, "ffn_width": 3072}  # four layers of a BERT of the usual width
WIDE_FLOATS = WIDE | {"weights_bytes": 219_000_000, "dtypes": {"float32": 219_000_000}}
WIDE_INTEGERS = WIDE | {"weights_bytes": 52_000_000, "dtypes": {"int8": 51_000_000, "float32": 1_000_000}}
# The peak of the server's anonymous memory in MiB, in runs of bench/estimates.py, for batches of so many tokens.
MEASURED: list[tuple[dict[str, Any], int, dict[str, Any]]] = [
    (FLOATS, 158, {"tokens": 256, "sequence": 256}),
    (FLOATS, 229, {"tokens": 2048, "sequence": 256}),
    (FLOATS, 305, {"tokens": 4096, "sequence": 256}),
    (FLOATS, 464, {"tokens": 8192, "sequence": 256}),
    (FLOATS, 257, {"tokens": 4096, "sequence": 64}),
    (FLOATS, 490, {"tokens": 4096, "sequence": 512}),
    (FLOATS, 792, {"tokens": 8192, "sequence": 512}),
    (FLOATS, 306, {"tokens": 2048, "sequence": 256, "workers": 2}),
    (INTEGERS, 85, {"tokens": 256, "sequence": 256}),
    (INTEGERS, 180, {"tokens": 2048, "sequence": 256}),
    (INTEGERS, 288, {"tokens": 4096, "sequence": 256}),
    (INTEGERS, 936, {"tokens": 16384, "sequence": 256}),
    (INTEGERS, 211, {"tokens": 4096, "sequence": 64}),
    (INTEGERS, 396, {"tokens": 4096, "sequence": 512}),
    (INTEGERS, 756, {"tokens": 8192, "sequence": 512}),
    (INTEGERS, 227, {"tokens": 2048, "sequence": 256, "fused": False}),
    (WIDE_FLOATS, 316, {"tokens": 256, "sequence": 256}),
    (WIDE_FLOATS, 412, {"tokens": 2048, "sequence": 256}),
    (WIDE_FLOATS, 496, {"tokens": 4096, "sequence": 64}),
    (WIDE_INTEGERS, 277, {"tokens": 2048, "sequence": 256}),
    (WIDE_INTEGERS, 356, {"tokens": 4096, "sequence": 64}),
]


@pytest.mark.parametrize(("facts", "truth", "how"), MEASURED)
def test_it_is_never_far_below_what_a_real_server_took(facts: dict[str, Any], truth: int, how: dict[str, Any]) -> None:
    found = estimate_onnx(facts, vocabulary=466_000, **how).total
    assert truth * 0.95 <= found / MIB <= truth * 1.25


def test_half_of_the_estimates_are_within_a_tenth() -> None:
    errors = [abs(estimate_onnx(f, vocabulary=466_000, **how).total / MIB / t - 1) for f, t, how in MEASURED]
    assert statistics.median(errors) <= 0.1


def test_of_several_graphs_the_one_that_runs_counts() -> None:
    both = {**FLOATS, "weights_bytes": 114_000_000, "graphs": {"a": FLOATS, "b": INTEGERS}}
    for file, alone in (("a", FLOATS), ("b", INTEGERS)):
        assert estimate_onnx(both, tokens=512, sequence=64, file=file) == estimate_onnx(alone, tokens=512, sequence=64)


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
