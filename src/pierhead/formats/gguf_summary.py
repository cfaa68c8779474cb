"""The small JSON-safe summary of a GGUF header: what people ask about a model and what the estimate needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pierhead.formats.ggml import FILE_TYPES
from pierhead.formats.gguf_parser import Header, Tensor, corrupt

MAX_LAYERS = 4096
MAX_LAYOUTS = 64
MAX_ARCHITECTURE = 64
MAX_LINE = 500
_BLOCK = re.compile(r"(?:[a-z]{1,8}\.)?blk\.(\d{1,5})\.(.+)", re.ASCII)
_STATE_TENSORS = ("ssm_", "shortconv.", "time_mix_")
_CACHE_TENSORS = ("attn_k.", "attn_kv_a_mqa.", "attn_qkv.", "attn_kv.")
_LARGE = 1 << 40


def summary(header: Header) -> dict[str, Any]:
    """Architecture, size and shape of the model, without its vocabulary; ``CorruptData`` where known keys lie.

    Keys that the file does not tell are ``None``. ``heads_kv`` and ``feed_forward_length`` are a number, or a list
    with one number for each layer. ``per_layer`` groups layers of equal layout: ``{"layers": [0, 1, …], "bytes":
    of one such layer, "tensors": {name: [type, dim, …]}}``; ``other`` holds the tensors outside of all layers.
    """
    facts = _Facts(header)
    layers = facts.count("block_count", MAX_LAYERS) or 0
    grouped, other = _by_layer(header.tensors)
    heads = facts.per_layer("attention.head_count", layers)
    embedding = facts.count("embedding_length")
    head = _head_dim(embedding, heads)
    return {
        "format": "gguf",
        "version": header.version,
        "architecture": facts.architecture,
        "name": facts.short("general.name"),
        "license": facts.short("general.license"),
        "size_label": facts.short("general.size_label"),
        "type": facts.short("general.type"),
        "parameters": sum(tensor.elements for tensor in header.tensors),
        "quantization": _quantization(header, facts),
        "weights_bytes": sum(tensor.nbytes for tensor in header.tensors),
        "tensor_count": len(header.tensors),
        "split_count": facts.total("split.count") or 1,
        "shards_read": header.shards,
        "context_length": facts.count("context_length"),
        "embedding_length": embedding,
        "layers": layers,
        "heads": heads,
        "heads_kv": _default(facts.per_layer("attention.head_count_kv", layers), heads),
        "head_dim_k": _default(facts.count("attention.key_length"), head),
        "head_dim_v": _default(facts.count("attention.value_length"), head),
        "ffn_width": _width(grouped, "ffn_up.", "ffn_gate."),
        "expert_width": _width(grouped, "ffn_up_exps.", "ffn_gate_exps."),
        "feed_forward_length": facts.per_layer("feed_forward_length", layers),
        "vocab_size": _default(facts.length("tokenizer.ggml.tokens"), facts.count("vocab_size")),
        "tokenizer": facts.short("tokenizer.ggml.model"),
        "sliding_window": facts.count("attention.sliding_window") or None,
        "experts": facts.count("expert_count") or None,
        "experts_used": facts.count("expert_used_count") or None,
        "pooling": facts.count("pooling_type"),
        "causal": facts.count("attention.causal", 1) != 0,
        "chat_template": facts.text("tokenizer.chat_template"),
        "attention": _attention(facts, layers),
        "state": _state(facts, grouped),
        "cache_layers": _cached(grouped) if header.shards == (facts.total("split.count") or 1) else None,
        "per_layer": _layouts(grouped),
        "other": _shapes(other[:MAX_LAYOUTS]),
    }


class _Facts:
    """Typed access to metadata; a known key of a wrong type or of an absurd value is ``CorruptData``."""

    def __init__(self, header: Header) -> None:
        self._header = header
        architecture = self.text("general.architecture")
        if not architecture or len(architecture) > MAX_ARCHITECTURE:
            corrupt("metadata 'general.architecture' is missing or no name")
        self.architecture = architecture

    def text(self, key: str) -> str | None:
        value = self._header.metadata.get(key)
        if not (isinstance(value, str) or (value is None and key not in self._header.arrays)):
            corrupt(f"metadata {key!r} is {_shown(value)}, not text")
        return value

    def short(self, key: str) -> str | None:
        """Text of which a line is enough."""
        value = self.text(key)
        return None if value is None else value[:MAX_LINE]

    def total(self, key: str, most: int = _LARGE) -> int | None:
        """A count under its full name."""
        value = self._header.metadata.get(key)
        return None if value is None and key not in self._header.arrays else _count(key, value, most)

    def count(self, key: str, most: int = _LARGE) -> int | None:
        """A count under the architecture's own prefix."""
        return self.total(f"{self.architecture}.{key}", most)

    def length(self, key: str) -> int | None:
        return self._header.arrays.get(key)

    def per_layer(self, key: str, layers: int) -> int | list[int] | None:
        """One number for all layers, or a list that has one for each."""
        full = f"{self.architecture}.{key}"
        if full not in self._header.arrays:
            return self.total(full)
        value = self._header.metadata.get(full)
        if not isinstance(value, tuple) or len(value) < layers:
            corrupt(f"metadata {full!r} has {self._header.arrays[full]} values for {layers} layers")
        found = [_count(full, item, _LARGE) for item in value[:layers]]
        return found[0] if found and len(set(found)) == 1 else found


def _count(key: str, value: object, most: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= most:
        corrupt(f"metadata {key!r} is {_shown(value)}, not a count up to {most}")
    return int(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _default(value: Any, other: Any) -> Any:
    return other if value is None else value


def _head_dim(embedding: int | None, heads: int | list[int] | None) -> int | None:
    most = max(heads, default=0) if isinstance(heads, list) else heads
    return embedding // most if embedding and most else None


def _quantization(header: Header, facts: _Facts) -> str:
    """The name of ``general.file_type`` unless the tensors speak against it, else the type most bytes have."""
    share: dict[str, int] = {}
    for tensor in header.tensors:
        share[tensor.type.name] = share.get(tensor.type.name, 0) + tensor.nbytes
    majority = max(share, key=lambda name: share[name], default="unknown")
    number = facts.total("general.file_type", 1 << 32)
    named = None if number is None else FILE_TYPES.get(number & ~1024)
    if named is None or (named in {"F32", "F16"} and share and named not in share):
        return majority
    return named


def _width(grouped: Mapping[int, list[Tensor]], *prefixes: str) -> int:
    """The widest hidden vector of a feed-forward step; metadata may name widths that no layer uses."""
    shapes = (tensor.shape for tensors in grouped.values() for tensor in tensors if tensor.name.startswith(prefixes))
    return max((shape[1] for shape in shapes if len(shape) > 1), default=0)


def _attention(facts: _Facts, layers: int) -> dict[str, Any]:
    """What shapes the KV cache beyond head counts: sliding windows, compressed (MLA) and shared caches."""
    keys = {
        "key_length_mla": "attention.key_length_mla",
        "value_length_mla": "attention.value_length_mla",
        "key_length_swa": "attention.key_length_swa",
        "value_length_swa": "attention.value_length_swa",
        "kv_lora_rank": "attention.kv_lora_rank",
        "rope_dims": "rope.dimension_count",
        "shared_kv_layers": "attention.shared_kv_layers",
        "indexer_key_length": "attention.indexer.key_length",
        "nextn_layers": "nextn_predict_layers",
    }
    found: dict[str, Any] = {name: facts.count(key) for name, key in keys.items()}
    found["sliding_window_pattern"] = facts.per_layer("attention.sliding_window_pattern", layers)
    return {name: value for name, value in found.items() if value is not None}


def _state(facts: _Facts, grouped: Mapping[int, list[Tensor]]) -> dict[str, Any]:
    """Sizes of recurrent state, and the layers that have it; empty for a plain transformer."""
    layers = _layers_with(grouped, _has_state)
    if not layers:
        return {}
    keys = {
        "conv_kernel": "ssm.conv_kernel",
        "inner_size": "ssm.inner_size",
        "state_size": "ssm.state_size",
        "group_count": "ssm.group_count",
        "wkv_head_size": "wkv.head_size",
        "token_shift_count": "token_shift_count",
        "shortconv_cache": "shortconv.l_cache",
        "kda_head_dim": "kda.head_dim",
    }
    found: dict[str, Any] = {name: facts.count(key) for name, key in keys.items()}
    return {"layers": layers, **{name: value for name, value in found.items() if value is not None}}


def _by_layer(tensors: Iterable[Tensor]) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
    grouped: dict[int, list[Tensor]] = {}
    other: list[Tensor] = []
    for tensor in tensors:
        match = _BLOCK.fullmatch(tensor.name)
        number = int(match[1]) if match else MAX_LAYERS
        if match and number < MAX_LAYERS:
            grouped.setdefault(number, []).append(tensor._replace(name=match[2]))
        else:
            other.append(tensor)
    return grouped, other


def _has_state(names: list[str]) -> bool:
    return any(name.startswith(_STATE_TENSORS) for name in names)


def _has_cache(names: list[str]) -> bool:
    """Linear attention has a fused qkv too, but beside its state tensors."""
    wanted = _CACHE_TENSORS[:2] if _has_state(names) else _CACHE_TENSORS
    return any(name.startswith(wanted) for name in names)


def _cached(grouped: Mapping[int, list[Tensor]]) -> list[int] | None:
    """Layers with a KV cache; ``None`` (all of them) where the names of the tensors tell nothing."""
    return _layers_with(grouped, _has_cache) or (None if not _layers_with(grouped, _has_state) else [])


def _layers_with(grouped: Mapping[int, list[Tensor]], test: Any) -> list[int]:
    return sorted(number for number, tensors in grouped.items() if test([tensor.name for tensor in tensors]))


def _layouts(grouped: Mapping[int, list[Tensor]]) -> list[dict[str, Any]]:
    """Layers of equal layout share a row; where there are absurdly many layouts, only the sizes are told."""
    rows: dict[tuple[tuple[Any, ...], ...], list[int]] = {}
    for number in sorted(grouped):
        layout = tuple(sorted((tensor.name, tensor.type.name, *tensor.shape) for tensor in grouped[number]))
        rows.setdefault(layout, []).append(number)
    small = len(rows) <= MAX_LAYOUTS and sum(map(len, rows)) <= MAX_LAYOUTS * MAX_LAYOUTS
    return [
        {
            "layers": numbers,
            "bytes": sum(tensor.nbytes for tensor in grouped[numbers[0]]),
            "tensors": {name: list(rest) for name, *rest in layout} if small else {},
        }
        for layout, numbers in rows.items()
    ]


def _shapes(tensors: Iterable[Tensor]) -> dict[str, list[Any]]:
    return {tensor.name: [tensor.type.name, *tensor.shape] for tensor in tensors}
