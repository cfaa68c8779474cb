"""Writers of small safetensors, ONNX and DDUF files, from the formats' descriptions; hostile ones by overriding."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "torch_dtype": "bfloat16",
}


def safetensors(tensors: dict[str, tuple[str, list[int], int]], metadata: dict[str, str] | None = None) -> bytes:
    """A file of zeros; ``tensors`` are (type, shape, bytes) by name, one after another."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return raw_safetensors(json.dumps(header).encode(), at)


def raw_safetensors(header: bytes, size: int) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(size)


def llama_folder(folder: Path, *, shards: int = 1, template: str = "") -> Path:
    """A folder as Hugging Face's libraries write it, with weights of zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_text("{}")
    about: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | ({"chat_template": template} if template else {})))
    names: dict[str, str] = {}
    for number in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensor = f"model.layers.{number}.mlp.weight"
        (folder / name).write_bytes(safetensors({tensor: ("BF16", [64, 320], 64 * 320 * 2)}, {"format": "pt"}))
        names[tensor] = name
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


# --- protobuf -----------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def block(field: int, data: bytes, claimed: int | None = None) -> bytes:
    return varint(field << 3 | 2) + varint(len(data) if claimed is None else claimed) + data


def initializer(name: str, dims: list[int], kind: int = 1, *, data: bytes = b"", location: str = "") -> bytes:
    raw = b"".join(number(1, d) for d in dims) + number(2, kind) + block(8, name.encode())
    if data:
        raw += block(9, data)
    if location:
        raw += block(13, block(1, b"location") + block(2, location.encode())) + number(14, 1)
    return block(5, raw)


def onnx_model(graph: bytes, *, head: bytes = b"") -> bytes:
    return number(1, 10) + block(2, b"test") + head + block(7, graph) + block(8, number(2, 21))


# --- zip ----------------------------------------------------------------------------------------------------------


def dduf(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path
