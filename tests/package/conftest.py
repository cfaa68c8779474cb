"""Fixtures of packaging: a store, and small valid models and adapters."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
import pytest

from pierhead.store.layout import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def write_lora(path: Path, architecture: str = "llama", *, base: Path | None = None, rank: int = 4) -> Path:
    """A LoRA as llama.cpp's converter writes one; for the real model in ``base`` with tensors of its shapes."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    shapes = {"blk.0.attn_q.weight": (8, 8)}
    if base is not None:
        found = gguf.GGUFReader(str(base)).tensors
        shapes = {t.name: (int(t.shape[0]), int(t.shape[1])) for t in found if t.name.endswith("attn_q.weight")}
    noise = numpy.random.default_rng(7)
    for name, (width, height) in shapes.items():
        writer.add_tensor(f"{name}.lora_a", noise.normal(0, 0.5, (rank, width)).astype(numpy.float32))
        writer.add_tensor(f"{name}.lora_b", noise.normal(0, 0.5, (height, rank)).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path,
    architecture: str = "llama",
    *,
    size: int = 64,
    kind: str = "model",
    split: tuple[int, int] | None = None,
) -> Path:
    """A GGUF with one tensor of ``size`` KiB; ``split`` is (number from 0, count)."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(kind)
    writer.add_context_length(2048)
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_chat_template("{{ messages[0].content }}")
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[1])
    number = 0 if split is None else split[0]
    writer.add_tensor(f"blk.{number}.attn_k.weight", numpy.zeros((size * 4, 64), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
