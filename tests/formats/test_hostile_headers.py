"""Files that lie: each gives one clear CorruptData, quickly and in little memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.formats import gguf

from .conftest import ARRAY, BOOL, F32, STRING, U8, U32, U64, Maker, TensorSpec, Typed, llama_tensors

HUGE = (1 << 64) - 1
ARCH = ("general.architecture", "llama")


def big_endian() -> bytes:
    return b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64)


def one(key: Any, value: Any) -> bytes:
    return Maker(metadata=[ARCH, (key, value)]).build()


def tensor(*tensors: TensorSpec, **more: Any) -> bytes:
    return Maker(metadata=[ARCH], tensors=tensors, data=False, **more).build() + bytes(4096)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "ends inside its header"),
    "another format": (b"\x80PK\x03" + bytes(100), "starts with"),
    "version 1": (Maker(version=1).build() + bytes(64), "version 1 is not supported"),
    "version 999": (Maker(version=999).build() + bytes(64), "version 999 is not supported"),
    "big endian": (big_endian(), "big-endian"),
    "more keys than accepted": (Maker(key_count=HUGE).build(), "metadata keys"),
    "more tensors than accepted": (Maker(tensor_count=HUGE).build(), "tensors"),
    "more keys than the file can hold": (Maker(key_count=16_000).build(), "can hold"),
    "more tensors than the file can hold": (Maker(tensor_count=60_000).build(), "can hold"),
    "an endless key": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE) + bytes(64), "claims"),
    "an empty key": (one("", 1), "empty"),
    "a key twice": (one("general.architecture", "llama"), "appears twice"),
    "an array key twice": (Maker(metadata=[ARCH, ("a", [1]), ("a", 1)]).build(), "appears twice"),
    "a key that is not text": (one(b"\xff\xfe", 1), "not UTF-8"),
    "a value that is not text": (one("general.name", b"\xff\xfe"), "not UTF-8"),
    "an unknown value type": (one("x", Typed(77, 0)), "unknown type 77"),
    "an unknown element type": (one("x", Typed(ARRAY, [], 77)), "unknown type 77"),
    "arrays in arrays": (one("x", Typed(ARRAY, [Typed(ARRAY, [1], U32)], ARRAY)), "array of arrays"),
    "an endless array": (one("x", Typed(ARRAY, [], U8, HUGE)), "elements"),
    "an array of endless count of text": (one("x", Typed(ARRAY, [], STRING, 1 << 61)), "elements"),
    "a vocabulary longer than the file": (one("tokenizer.ggml.tokens", Typed(ARRAY, ["a"], STRING, 5000)), "elements"),
    "an endless token": (
        one("tokenizer.ggml.tokens", Typed(ARRAY, [struct.pack("<Q", HUGE)], ARRAY)).replace(
            struct.pack("<IIQ", ARRAY, ARRAY, 1), struct.pack("<IIQ", ARRAY, STRING, 1)
        ),
        "claims",
    ),
    "alignment zero": (one("general.alignment", 0), "alignment"),
    "alignment three": (one("general.alignment", 3), "alignment"),
    "alignment as text": (one("general.alignment", "32"), "alignment"),
    "alignment of a gibibyte": (one("general.alignment", 1 << 30), "alignment"),
    "no dimensions": (tensor(TensorSpec("t", ())), "0 dimensions"),
    "many dimensions": (tensor(TensorSpec("t", (1, 1, 1, 1, 1))), "5 dimensions"),
    "a zero dimension": (tensor(TensorSpec("t", (0,))), "impossible shape"),
    "dimensions that overflow": (tensor(TensorSpec("t", (1 << 32, 1 << 32))), "impossible shape"),
    "an unknown tensor type": (tensor(TensorSpec("t", (32,), 99)), "unknown type 99"),
    "a tensor type of the past": (tensor(TensorSpec("t", (32,), 31)), "type 31, which llama.cpp removed"),
    "rows that do not fill blocks": (tensor(TensorSpec("t", (33,), 2)), "do not divide"),
    "an unaligned offset": (tensor(TensorSpec("t", (32,), 0, 7)), "not at a multiple"),
    "an offset beyond the file": (tensor(TensorSpec("t", (32,), 0, 1 << 40)), "the file has only"),
    "an offset at the end of numbers": (tensor(TensorSpec("t", (32,), 0, HUGE - 31)), "the file has only"),
    "overlapping tensors": (tensor(TensorSpec("t", (32,)), TensorSpec("u", (32,), 0, 32)), "overlap"),
    "a tensor twice": (tensor(TensorSpec("t", (8,)), TensorSpec("t", (8,), 0, 32)), "appears twice"),
    "a tensor name without end": (tensor(TensorSpec("t" * 300, (8,))), "tensor name claims"),
    "a tensor name that is not text": (tensor(TensorSpec(b"\xff", (8,))), "not UTF-8"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_its_reason_and_name(case: str, written: Callable[[bytes], Path]) -> None:
    data, reason = HOSTILE[case]
    path = written(data)
    with pytest.raises(CorruptData, match=reason) as caught:
        gguf.read_file(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general.architecture": None}, "architecture' is missing"),
        ({"general.architecture": "x" * 100_000}, "or no name"),
        ({"general.architecture": 7}, "not text"),
        ({"general.name": 7}, "not text"),
        ({"general.file_type": "Q4"}, "not a count"),
        ({"llama.block_count": "two"}, "not a count"),
        ({"llama.block_count": 1 << 20}, "not a count up to"),
        ({"llama.block_count": -1}, "not a count"),
        ({"llama.block_count": 2.5}, "not a count"),
        ({"llama.block_count": [1, 2]}, "not a count"),
        ({"llama.context_length": Typed(U64, HUGE)}, "not a count"),
        ({"llama.embedding_length": Typed(F32, float("nan"))}, "not a count"),
        ({"llama.attention.head_count_kv": [2]}, "1 values for 2 layers"),
        ({"llama.attention.head_count_kv": ["a", "b"]}, "not a count"),
        ({"llama.attention.head_count": Typed(ARRAY, [1] * 5000, U8)}, "5000 values"),
        ({"tokenizer.chat_template": ["a"]}, "not text"),
        ({"split.count": "many"}, "not a count"),
    ],
)
def test_a_known_key_of_a_wrong_type_is_refused(
    changes: dict[str, Any], reason: str, tiny: Callable[..., bytes], written: Callable[[bytes], Path]
) -> None:
    with pytest.raises(CorruptData, match=reason):
        gguf.summary(gguf.read_files([written(tiny(changes))]))


def test_every_truncation_of_a_file_is_refused(tiny: Callable[..., bytes], written: Callable[[bytes], Path]) -> None:
    whole = tiny()
    for length in [*range(0, 1200, 7), len(whole) - 1, len(whole) // 2]:
        with pytest.raises(CorruptData):
            gguf.read_file(written(whole[:length]))
    gguf.read_file(written(whole))


def test_a_file_cut_inside_its_weights_is_refused(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2.open("rb") as file:
        path.write_bytes(file.read(8 << 20))
    with pytest.raises(CorruptData, match="but the file has only 8388608"):
        gguf.read_file(path)


def test_a_path_that_is_not_a_file_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        gguf.read_file(tmp_path / "none.gguf")
    with pytest.raises(UsageError, match="is not a file"):
        gguf.read_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is not a file"):
        gguf.read_file(tmp_path / "pipe")


@pytest.mark.parametrize(
    "flood",
    [
        Maker(metadata=[ARCH], key_count=16_000),
        Maker(metadata=[("x" * 500 + str(i), "y" * 60_000) for i in range(600)]),
        Maker(metadata=[(f"k{i}", ["z" * 1000] * 1000) for i in range(40)]),
        Maker(metadata=[(f"k{i}", Typed(ARRAY, [True] * 1000, BOOL)) for i in range(400)]),
        Maker(metadata=[("tokenizer.ggml.tokens", Typed(ARRAY, [""] * 200_000, STRING))]),
        Maker(metadata=[ARCH], tensors=[TensorSpec(f"{i}" + "n" * 200, (1,), 24) for i in range(20_000)]),
    ],
    ids=["keys", "text", "text arrays", "number arrays", "empty tokens", "tensors"],
)
def test_a_flood_is_read_or_refused_in_bounded_memory_and_time(flood: Maker) -> None:
    data = flood.build()

    async def fetch(offset: int, length: int) -> bytes:
        return data[offset : offset + length] or bytes(length)  # an endless file: zeros after the flood

    tracemalloc.start()
    started = time.perf_counter()
    try:
        with contextlib.suppress(CorruptData):
            gguf.summary(asyncio.run(gguf.read_remote(fetch, None)))
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 96 << 20
    assert time.perf_counter() - started < 30


def test_a_header_without_end_stops_at_64_mib() -> None:
    fetched: list[int] = []
    filler = one("tokenizer.ggml.tokens", Typed(ARRAY, [], STRING, 8_000_000))

    async def fetch(offset: int, length: int) -> bytes:
        fetched.append(length)
        head = filler[offset : offset + length]
        return head + (struct.pack("<Q", 8) + b"abcdefgh") * ((length - len(head)) // 16 + 1)

    with pytest.raises(CorruptData):
        asyncio.run(gguf.read_remote(fetch, None))
    assert sum(fetched) <= 64 << 20
    assert max(fetched) <= 16 << 20


def test_a_remote_file_that_ends_early_is_refused(tiny: Callable[..., bytes]) -> None:
    data = tiny()[:300]

    async def fetch(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    with pytest.raises(CorruptData, match="ends inside its header, after 300 bytes"):
        asyncio.run(gguf.read_remote(fetch, None))


def test_llama_tensors_of_the_builder_are_valid(maker: type[Maker], written: Callable[[bytes], Path]) -> None:
    header = gguf.read_file(written(maker(metadata=[ARCH], tensors=llama_tensors()).build()))
    assert [tensor.name for tensor in header.tensors][:2] == ["token_embd.weight", "output_norm.weight"]


def test_a_vocabulary_is_stepped_over_without_making_objects(written: Callable[[bytes], Path]) -> None:
    tokens = Typed(ARRAY, [f"token{number}" for number in range(262_144)], STRING)
    path = written(Maker(metadata=[ARCH, ("tokenizer.ggml.tokens", tokens)]).build())
    tracemalloc.start()
    header = gguf.read_file(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert header.arrays["tokenizer.ggml.tokens"] == 262_144
    assert "tokenizer.ggml.tokens" not in header.metadata
    assert peak < 12 << 20  # the file has 5 MiB
