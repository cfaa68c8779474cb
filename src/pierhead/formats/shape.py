"""The shape of a model's memory per layer, from its summary: what llama.cpp keeps in caches for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from pierhead.errors import CorruptData
from pierhead.formats.gguf_summary import MAX_LAYERS

# Architectures that llama.cpp runs without a KV cache (llama_model::create_memory).
CACHELESS = frozenset(
    {
        *(
            "bert",
            "jina-bert-v2",
            "jina-bert-v3",
            "nomic-bert",
            "nomic-bert-moe",
            "neo-bert",
            "modern-bert",
            "eurobert",
        ),
        *("gemma-embedding", "t5encoder", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1"),
    }
)

# Every n-th layer attends to everything, the others to a window; source: llama.cpp's load_arch_hparams. Architectures
# that are not here and do not store a pattern have a sliding window in their metadata that llama.cpp does not use.
_PATTERNS: dict[str, tuple[int, bool]] = {  # period, whether the full layer comes first in it
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "cohere2": (4, False),
    "gpt-oss": (2, False),
    "llama4": (4, False),
    "olmo2": (4, False),
    "exaone4": (4, False),
    "smallthinker": (4, True),
    "afmoe": (4, False),
}
_GEMMA3N_CACHED_LAYERS = 20
_LLAMA4_CHUNK = 8192


@dataclass(frozen=True)
class Layer:
    """One layer's cache: elements per token of K and V (0: none), and whether only a window of tokens is kept."""

    k: int
    v: int
    windowed: bool


@dataclass(frozen=True)
class Shape:
    """A model as its memory sees it; ``state`` is the recurrent state of one sequence, all layers, in bytes.

    ``ffn`` and ``expert`` are the widths of a dense and of one expert's feed-forward step, ``inner`` that of a
    state-space layer.
    """

    embedding: int
    vocabulary: int
    heads: int
    head_dim_k: int
    head_dim_v: int
    ffn: int
    expert: int
    experts_used: int
    inner: int
    window: int
    layers: tuple[Layer, ...]
    state: int
    state_layers: int

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Shape:
        """``CorruptData`` where a summary that came from outside has a value of a wrong type."""
        facts = Facts(summary)
        architecture = str(summary.get("architecture"))
        window = facts.number("sliding_window")
        if architecture == "llama4":
            window = _LLAMA4_CHUNK
        return cls(
            embedding=facts.number("embedding_length"),
            vocabulary=facts.number("vocab_size"),
            heads=facts.most("heads"),
            head_dim_k=facts.number("head_dim_k"),
            head_dim_v=facts.number("head_dim_v"),
            ffn=facts.number("ffn_width"),
            expert=facts.number("expert_width"),
            experts_used=max(facts.number("experts_used"), 1),
            inner=facts.inner("state").number("inner_size"),
            window=window,
            layers=_layers(facts, architecture, window),
            state=_state(facts),
            state_layers=len(facts.inner("state").listed("layers") or []),
        )


class Facts:
    """Typed access to a stored summary."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def number(self, key: str, default: int = 0) -> int:
        value = self._raw.get(key)
        return default if value is None else _natural(key, value)

    def numbers(self, key: str, count: int, default: int = 0) -> list[int]:
        """One number per layer, from a list or from one number for all."""
        value = self._raw.get(key)
        if not isinstance(value, list):
            return [self.number(key, default)] * count
        found = [_natural(key, item) for item in cast("list[object]", value)]
        if len(found) < count:
            raise bad_summary(key)
        return found[:count]

    def most(self, key: str) -> int:
        value = self._raw.get(key)
        if isinstance(value, list):
            return max((_natural(key, item) for item in cast("list[object]", value)), default=0)
        return self.number(key)

    def listed(self, key: str) -> list[int] | None:
        value = self._raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise bad_summary(key)
        return [_natural(key, item) for item in cast("list[object]", value)]

    def has(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def is_list(self, key: str) -> bool:
        return isinstance(self._raw.get(key), list)

    def inner(self, key: str) -> Facts:
        value: object = self._raw.get(key)
        if value is None:
            return Facts({})
        if not isinstance(value, Mapping):
            raise bad_summary(key)
        return Facts(cast("Mapping[str, Any]", value))


def bad_summary(key: str) -> CorruptData:
    """The error for a stored summary that cannot be what ``gguf.summary`` made."""
    return CorruptData(f"the model's stored summary has a bad {key!r}", hint="Pull the model again.")


def _natural(key: str, value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise bad_summary(key)
    return int(value)


def _layers(facts: Facts, architecture: str, window: int) -> tuple[Layer, ...]:
    count = facts.number("layers")
    if count > MAX_LAYERS:
        raise bad_summary("layers")
    if architecture in CACHELESS or not count:
        return ()
    attention = facts.inner("attention")
    heads_kv = facts.numbers("heads_kv", count)
    dim_k, dim_v = facts.number("head_dim_k"), facts.number("head_dim_v")
    swa_k, swa_v = attention.number("key_length_swa", dim_k), attention.number("value_length_swa", dim_v)
    compressed = attention.has("key_length_mla") and attention.has("value_length_mla")
    windowed = _windowed(attention, architecture, window, count)
    cached = _cached(facts, attention, architecture, count)
    layers: list[Layer] = []
    for index in range(count):
        if index not in cached or not heads_kv[index]:
            layers.append(Layer(0, 0, windowed[index]))
            continue
        k, v = (swa_k, swa_v) if windowed[index] else (dim_k, dim_v)
        # MLA: K holds the compressed latent and the rope part, V is read from the same cells
        stored_v = 0 if compressed else v * heads_kv[index]
        indexer = attention.number("indexer_key_length")
        layers.append(Layer(k * heads_kv[index] + indexer, stored_v, windowed[index]))
    return tuple(layers)


def _windowed(attention: Facts, architecture: str, window: int, count: int) -> list[bool]:
    if not window:
        return [False] * count
    if attention.is_list("sliding_window_pattern"):
        return [bool(flag) for flag in attention.numbers("sliding_window_pattern", count)]
    period, full_first = _PATTERNS.get(architecture, (1, False))
    period = attention.number("sliding_window_pattern", period)
    if period < 1:
        return [True] * count
    return [index % period != 0 if full_first else index % period < period - 1 for index in range(count)]


def _cached(facts: Facts, attention: Facts, architecture: str, count: int) -> set[int]:
    """Layers with a KV cache: those that have K weights, less those that share an earlier layer's cache."""
    own = facts.listed("cache_layers")
    found = set(range(count)) if own is None else set(own)
    shared = attention.number("shared_kv_layers")
    if architecture == "gemma3n" and not shared:
        shared = max(count - _GEMMA3N_CACHED_LAYERS, 0)
    nextn = attention.number("nextn_layers")
    return {index for index in found if index < count - shared - nextn}


def _state(facts: Facts) -> int:
    """Bytes of recurrent state of one sequence (always f32); source: llama_hparams::n_embd_r and n_embd_s."""
    state = facts.inner("state")
    layers = state.listed("layers") or []
    embedding = facts.number("embedding_length")
    if state.has("wkv_head_size"):
        rolling = state.number("token_shift_count", 2) * embedding
        memory = embedding * state.number("wkv_head_size")
    elif state.has("shortconv_cache"):
        rolling, memory = embedding * max(state.number("shortconv_cache") - 1, 0), 0
    elif state.has("kda_head_dim"):
        inner = state.number("kda_head_dim") * facts.most("heads")
        rolling = 3 * max(state.number("conv_kernel") - 1, 0) * inner
        memory = state.number("kda_head_dim") * inner
    else:
        channels = state.number("inner_size") + 2 * state.number("group_count") * state.number("state_size")
        rolling = max(state.number("conv_kernel") - 1, 0) * channels
        memory = state.number("state_size") * state.number("inner_size")
    return 4 * (rolling + memory) * len(layers)
