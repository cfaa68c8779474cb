"""The summary and split models, on small generated files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pierhead.errors import CorruptData
from pierhead.formats import gguf

from .conftest import LLAMA, Maker, TensorSpec, llama_tensors


def shard(number: int, count: int, tensors: list[TensorSpec], total: int, **extra: Any) -> bytes:
    first = LLAMA if number == 0 else {"general.architecture": "llama"}
    keys = {**first, "split.no": number, "split.count": count, "split.tensors.count": total, **extra}
    return Maker(metadata=list(keys.items()), tensors=tensors).build()


def test_a_summary_survives_json_and_stays_small(tiny: Callable[..., bytes], written: Callable[[bytes], Path]) -> None:
    found = gguf.summary(gguf.read_file(written(tiny())))
    assert json.loads(json.dumps(found)) == found
    assert len(json.dumps(found)) < 2500
    assert found["head_dim_k"] == 16
    assert found["vocab_size"] == 32
    assert found["per_layer"][0]["layers"] == [0, 1]
    assert found["per_layer"][0]["tensors"]["attn_q.weight"] == ["Q4_0", 64, 64]


def test_version_2_is_read_too(tiny: Callable[..., bytes], written: Callable[[bytes], Path]) -> None:
    assert gguf.summary(gguf.read_file(written(tiny(version=2))))["version"] == 2


@pytest.mark.parametrize(
    ("file_type", "name"),
    [(2, "Q4_0"), (15, "Q4_K_M"), (1024 + 7, "Q8_0"), (None, "Q4_0"), (999, "Q4_0"), (1, "Q4_0")],
    ids=["named", "mixed", "guessed", "absent", "unknown", "contradicted by the tensors"],
)
def test_the_quantization_is_the_files_word_or_what_most_bytes_have(
    file_type: int | None, name: str, tiny: Callable[..., bytes], written: Callable[[bytes], Path]
) -> None:
    found = gguf.summary(gguf.read_file(written(tiny({"general.file_type": file_type}))))
    assert found["quantization"] == name


def test_keys_per_layer_become_lists_and_equal_ones_a_number(
    tiny: Callable[..., bytes], written: Callable[[bytes], Path]
) -> None:
    mixed = {"llama.attention.head_count_kv": [2, 1], "llama.feed_forward_length": [128, 128]}
    found = gguf.summary(gguf.read_file(written(tiny(mixed))))
    assert found["heads_kv"] == [2, 1]
    assert found["feed_forward_length"] == 128


def test_the_alignment_of_the_file_is_followed(tiny: Callable[..., bytes], written: Callable[[bytes], Path]) -> None:
    header = gguf.read_file(written(tiny({"general.alignment": 256}, alignment=256)))
    assert header.alignment == 256
    assert header.data_offset % 256 == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_parts_of_a_split_model_are_one_in_any_order(
    order: tuple[int, ...], written: Callable[[bytes], Path]
) -> None:
    tensors = llama_tensors()
    parts = [tensors[:3], tensors[3:7], tensors[7:]]
    paths = [written(shard(number, 3, part, len(tensors))) for number, part in enumerate(parts)]
    found = gguf.summary(gguf.read_files([paths[number] for number in order]))
    whole = gguf.summary(gguf.read_file(written(Maker(metadata=list(LLAMA.items()), tensors=tensors).build())))
    assert (found["split_count"], found["shards_read"]) == (3, 3)
    for key in ("parameters", "weights_bytes", "tensor_count", "per_layer", "chat_template", "vocab_size"):
        assert found[key] == whole[key]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([(0, 3), (1, 3)], "parts 1, 2 of 3"),
        ([(0, 2), (0, 2)], "parts 1, 1 of 2"),
        ([(0, 2), (1, 3)], "parts 1, 2 of"),
        ([(1, 2)], "parts 2 of 2"),
        ([(0, 1 << 62)], "parts 1 of 4611686018427387904"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    parts: list[tuple[int, int]], reason: str, written: Callable[[bytes], Path]
) -> None:
    paths = [written(shard(no, count, [TensorSpec(f"t{index}", (8,))], 2)) for index, (no, count) in enumerate(parts)]
    with pytest.raises(CorruptData, match=reason):
        gguf.read_files(paths)


def test_missing_or_repeated_tensors_of_a_split_model_are_refused(written: Callable[[bytes], Path]) -> None:
    one, two = TensorSpec("t", (8,)), TensorSpec("u", (8,))
    with pytest.raises(CorruptData, match="3 were promised"):
        gguf.read_files([written(shard(0, 2, [one], 3)), written(shard(1, 2, [two], 3))])
    with pytest.raises(CorruptData, match="two of its parts"):
        gguf.read_files([written(shard(0, 2, [one], 2)), written(shard(1, 2, [one], 2))])
    with pytest.raises(CorruptData, match="no files"):
        gguf.read_files([])


def test_a_remote_read_works_when_the_server_gives_less_than_asked(tiny: Callable[..., bytes]) -> None:
    data = tiny()
    asked: list[tuple[int, int]] = []

    async def fetch(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return data[offset : offset + min(length, 100)]

    header = asyncio.run(gguf.read_remote(fetch, len(data)))
    assert header.data_offset <= len(data)
    assert [offset for offset, _ in asked] == list(range(0, len(asked) * 100, 100))


def test_a_remote_header_is_read_without_a_known_size(tiny: Callable[..., bytes]) -> None:
    data = tiny()

    async def fetch(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    header = asyncio.run(gguf.read_remote(fetch, None))
    assert header.size is None
    assert gguf.summary(header)["parameters"] > 0


def test_absurdly_many_layouts_do_not_bloat_the_summary(written: Callable[[bytes], Path]) -> None:
    tensors = [TensorSpec(f"blk.{layer}.w{layer}" + "x" * 100, (8,), 24) for layer in range(4000)]
    metadata = [("general.architecture", "llama"), ("llama.block_count", 4000)]
    found = gguf.summary(gguf.read_file(written(Maker(metadata=metadata, tensors=tensors).build())))
    assert len(json.dumps(found)) < 300_000


def test_long_words_of_a_stranger_are_cut(tiny: Callable[..., bytes], written: Callable[[bytes], Path]) -> None:
    found = gguf.summary(gguf.read_file(written(tiny({"general.license": "x" * 100_000}))))
    assert len(found["license"]) == 500
