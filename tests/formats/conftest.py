"""A writer of GGUF files: valid ones in one call, hostile ones by overriding what the header claims."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pierhead.formats.ggml import TENSOR_TYPES

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACK = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


@dataclass(frozen=True)
class Typed:
    """A metadata value of a given GGUF type; an array has ``element`` and may lie about its ``count``."""

    type: int
    value: Any
    element: int = STRING
    count: int | None = None


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def encode(value: Any) -> bytes:
    """A metadata value with its type in front; plain Python values get the usual type."""
    if isinstance(value, Typed):
        if value.type == ARRAY:
            count = len(value.value) if value.count is None else value.count
            body = b"".join(_bare(value.element, item) for item in value.value)
            return struct.pack("<IIQ", ARRAY, value.element, count) + body
        return struct.pack("<I", value.type) + _bare(value.type, value.value)
    if isinstance(value, bool):
        return encode(Typed(BOOL, value))
    if isinstance(value, int):
        return encode(Typed(U32 if 0 <= value < 1 << 32 else I64, value))
    if isinstance(value, float):
        return encode(Typed(F32, value))
    if isinstance(value, (str, bytes)):
        return encode(Typed(STRING, value))
    element = {bool: BOOL, int: U32, float: F32}.get(type(value[0]), STRING) if value else U32
    return encode(Typed(ARRAY, value, element))


def _bare(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        return value if isinstance(value, bytes) else encode(value)[4:]
    return struct.pack("<" + PACK.get(kind, "I"), value)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor; ``offset`` follows the one before unless it is given."""

    name: str | bytes
    shape: Sequence[int]
    type: int = 0
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        kind = TENSOR_TYPES[self.type]
        elements = 1
        for extent in self.shape:
            elements *= extent
        return elements // kind.block * kind.size


@dataclass(frozen=True)
class Maker:
    """What a GGUF file holds and, where they differ, what it claims."""

    metadata: Sequence[tuple[str | bytes, Any]] = ()
    tensors: Sequence[TensorSpec] = ()
    version: int = 3
    magic: bytes = b"GGUF"
    key_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32
    data: bool = field(default=True)

    def build(self) -> bytes:
        head = self.magic + struct.pack(
            "<IQQ",
            self.version,
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.metadata) if self.key_count is None else self.key_count,
        )
        head += b"".join(text(key) + encode(value) for key, value in self.metadata)
        end = 0
        infos: list[bytes] = []
        for tensor in self.tensors:
            offset = end if tensor.offset is None else tensor.offset
            infos += [text(tensor.name), struct.pack("<I", len(tensor.shape))]
            infos += [struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape), struct.pack("<IQ", tensor.type, offset)]
            if self.data:
                end = -(-(offset + tensor.nbytes) // self.alignment) * self.alignment
        head += b"".join(infos)
        head += bytes(-len(head) % self.alignment)
        return head + bytes(end) if self.data else head


LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 2,
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"t{number}" for number in range(32)],
    "tokenizer.ggml.scores": [0.0] * 32,
    "tokenizer.chat_template": "{{ messages }}",
}


def llama_tensors(layers: int = 2) -> list[TensorSpec]:
    tensors = [TensorSpec("token_embd.weight", (64, 32), 2), TensorSpec("output_norm.weight", (64,))]
    for layer in range(layers):
        tensors += [
            TensorSpec(f"blk.{layer}.attn_q.weight", (64, 64), 2),
            TensorSpec(f"blk.{layer}.attn_k.weight", (64, 32), 2),
            TensorSpec(f"blk.{layer}.attn_v.weight", (64, 32), 2),
            TensorSpec(f"blk.{layer}.ffn_up.weight", (64, 128), 2),
        ]
    return tensors


@pytest.fixture(scope="session")
def maker() -> type[Maker]:
    """The builder itself: ``maker(metadata=[…], tensors=[…]).build()``."""
    return Maker


@pytest.fixture(scope="session")
def tiny() -> Callable[..., bytes]:
    """``tiny({key: value or None}, **overrides)``: bytes of a small valid llama file with some keys changed."""

    def build(changes: Mapping[str, Any] | None = None, **overrides: Any) -> bytes:
        metadata = {**LLAMA, **(changes or {})}
        kept = [(key, value) for key, value in metadata.items() if value is not None]
        return Maker(**{"metadata": kept, "tensors": llama_tensors(), **overrides}).build()

    return build


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes bytes to a new file and gives its path."""
    count = iter(range(1_000_000))

    def write(data: bytes) -> Path:
        path = tmp_path / f"{next(count)}.gguf"
        path.write_bytes(data)
        return path

    return write
