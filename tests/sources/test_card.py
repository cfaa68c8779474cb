"""Cards that are made for models: front matter that YAML readers take, whatever a header says."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pierhead.refs import Reference
from pierhead.sources.card import model_card
from pierhead.sources.outgoing import of_bytes
from pierhead.store.model import ModelFile, ModelRecord

TARGET = Reference("hf", "me/tiny")


def record(**metadata: Any) -> ModelRecord:
    about = {"format": "gguf", "architecture": "llama", "quantization": "Q4_K_M", "parameters": 134_515_008, **metadata}
    files = (ModelFile("Tiny-Q4_K_M.gguf", 98_000_000, "weights", "sha256:" + "a" * 64, "gguf"),)
    source = about.pop("source", "hf:org/Tiny:Q4_K_M@" + "0" * 40)
    return ModelRecord(
        name="tiny", names=("tiny",), digest="sha256:" + "b" * 64, size=98_000_000, created="", files=files,
        metadata=about, source=source,
    )  # fmt: skip


def front(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_a_card_tells_what_the_header_tells() -> None:
    known = record(license="apache-2.0", context_length=8192, chat_template="{{ x }}", name="Tiny")
    card = model_card(known, [of_bytes("a.gguf", b"x")], TARGET)
    assert front(card) == {
        "license": "apache-2.0",
        "base_model": "org/Tiny",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama", "q4_k_m", "pierhead"],
    }
    assert "134.52 M" in card
    assert "8,192 tokens" in card
    assert 'pier run hf:me/tiny:Q4_K_M "Hello"' in card
    assert of_bytes("a.gguf", b"x").sha256 in card


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"source": "hf:me/tiny@main"}, {"base_model": None, "base_model_relation": None}),
        ({"source": "https://host/x.gguf"}, {"base_model": None}),
        ({"quantization": "F16"}, {"base_model": "org/Tiny", "base_model_relation": None}),
        ({"architecture": "bert", "pooling": 1}, {"pipeline_tag": "feature-extraction"}),
        ({"license": "no idea: see below"}, {"license": None}),
        ({"format": "safetensors"}, {"library_name": "transformers"}),
    ],
)
def test_what_is_not_known_is_left_out(metadata: dict[str, Any], expected: dict[str, Any]) -> None:
    found = front(model_card(record(**metadata), [], TARGET))
    assert {key: found.get(key) for key in expected} == expected


@given(st.text(max_size=80), st.text(max_size=80), st.text(max_size=80))
def test_foreign_text_breaks_neither_the_front_matter_nor_the_table(
    name: str, architecture: str, license_: str
) -> None:
    card = model_card(record(name=name, architecture=architecture, license=license_), [], TARGET)
    found = front(card)
    assert set(found) <= {"license", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"}
    rows = [line for line in card.splitlines() if line.startswith("| ") and "Architecture" in line]
    assert all(row.replace("\\|", "").count("|") == 3 for row in rows)
