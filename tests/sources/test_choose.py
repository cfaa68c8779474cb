"""Which files a tag means, from lists of files as hubs really have them."""

from __future__ import annotations

import pytest

from pierhead.sources.choose import Entry, choices, choose, label_of, projector


@pytest.mark.parametrize(
    ("stem", "label"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "Q4_1"),
        ("qwen3-0.6b-q8_0", "Q8_0"),
        ("Qwen3-0.6B-UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("model-fp16", "F16"),
        ("gemma-3-270m-it-BF16", "BF16"),
        ("gpt-oss-20b-mxfp4", "MXFP4"),
        ("Llama-3.2-1B-Instruct-IQ4_XS", "IQ4_XS"),
        ("BitNet-TQ1_0", "TQ1_0"),
        ("Q6_K/Big", "Q6_K"),
        ("plain", "plain"),
        ("Phi-Q4.5-thing", "Q4"),
    ],
)
def test_the_quantization_is_read_from_the_name(stem: str, label: str) -> None:
    assert label_of(stem) == label


def test_default_falls_back_to_the_smallest() -> None:
    entries = [Entry("b-Q9_X.gguf", 20), Entry("a-Q7_X.gguf", 10)]
    assert choose(entries, "", "x").label == "Q7_X"


def test_an_incomplete_set_is_not_the_default() -> None:
    entries = [Entry("m-Q4_K_M-00001-of-00002.gguf", 10), Entry("m-Q8_0.gguf", 20)]
    assert choose(entries, "", "x").label == "Q8_0"


def test_matrices_and_projectors_are_not_models() -> None:
    entries = [Entry("imatrix_unsloth.gguf", 5), Entry("mmproj-F16.gguf", 5), Entry("m-Q4_0.gguf", 10)]
    assert [c.stem for c in choices(entries)] == ["m-Q4_0"]


def test_a_projector_of_another_folder_is_left_alone() -> None:
    entries = [Entry("a/m-Q4_0.gguf", 10), Entry("b/mmproj-F16.gguf", 5), Entry("a/mmproj-F32.gguf", 9)]
    found = projector(entries, choose(entries, "", "x"))
    assert found is not None
    assert found.path == "a/mmproj-F32.gguf"


def test_quantizations_in_folders_are_found() -> None:
    entries = [Entry(f"Q8_0/m-Q8_0-0000{n}-of-00002.gguf", 10) for n in (2, 1)] + [Entry("Q2_K/m-Q2_K.gguf", 3)]
    chosen = choose(entries, "q8-0", "x")
    assert [e.path[-19:] for e in chosen.entries] == ["-00001-of-00002.gguf"[1:], "-00002-of-00002.gguf"[1:]]
