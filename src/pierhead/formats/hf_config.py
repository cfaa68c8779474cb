"""A model's shape from the ``config.json`` that Hugging Face's libraries keep beside weights; pure.

The keys are those of ``gguf_summary.summary``, so that one estimate serves all formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pierhead.formats.gguf_summary import MAX_LAYERS, MAX_LINE
from pierhead.formats.reading import unusable

_LARGE = 1 << 40
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
# Models that read a text at once and keep nothing for a next token.
_ENCODERS = frozenset(
    {
        *("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "mpnet", "deberta"),
        *("deberta-v2", "modernbert", "nomic_bert", "new", "clip", "siglip", "vit", "wav2vec2", "hubert", "esm"),
    }
)


def shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config tells; CorruptData where a known key has a value that it cannot have."""
    facts = _Facts(config)
    inner = _Facts(facts.nested("text_config", "llm_config", "language_config") or config)
    heads = inner.count("num_attention_heads", "n_head", "n_heads", "num_heads")
    embedding = inner.count("hidden_size", "n_embd", "d_model", "dim")
    layers = inner.count("num_hidden_layers", "n_layer", "n_layers", "num_layers", most=MAX_LAYERS) or 0
    heads_kv = inner.count("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")
    if heads_kv is None:
        heads_kv = 1 if inner.flag("multi_query") else heads
    head = inner.count("head_dim", "attention_head_dim", "kv_channels") or (
        embedding // heads if embedding and heads else None
    )
    attention, cached = _attention(inner, layers)
    dim_k, dim_v = head, inner.count("v_head_dim") or head
    if "kv_lora_rank" in attention:  # one compressed vector for each token, from which K and V are made
        dim_k = attention["kv_lora_rank"] + (inner.count("qk_rope_head_dim") or 0)
        heads_kv = 1
    architecture = facts.word("model_type") or _class(facts) or "unknown"
    return {
        "architecture": architecture,
        "class": _class(facts),
        "labels": _labels(facts),
        "context_length": inner.count(*_CONTEXT),
        "embedding_length": embedding,
        "layers": layers,
        "heads": heads,
        "heads_kv": heads_kv,
        "head_dim_k": dim_k,
        "head_dim_v": dim_v,
        "ffn_width": inner.count("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim") or 0,
        "expert_width": (inner.count("moe_intermediate_size") or 0) if _experts(inner) else 0,
        "vocab_size": inner.count("vocab_size", "padded_vocab_size"),
        "sliding_window": None if inner.flag("use_sliding_window") is False else inner.count("sliding_window") or None,
        "experts": _experts(inner),
        "experts_used": inner.count("num_experts_per_tok", "num_experts_per_token", "moe_topk") or None,
        "causal": architecture not in _ENCODERS,
        "attention": attention,
        "cache_layers": [] if architecture in _ENCODERS else cached,
        "dtype": facts.word("dtype") or facts.word("torch_dtype") or inner.word("torch_dtype"),
    }


def quantization(config: Mapping[str, Any]) -> tuple[str, int]:
    """How weights were quantized, in words (``gptq 4-bit``), and bits per weight; empty and 0 where they were not."""
    given: Any = config.get("quantization_config") or config.get("quantization") or {}
    if not isinstance(given, Mapping):
        return "", 0
    facts = _Facts(cast("Mapping[str, Any]", given))
    method = facts.word("quant_method") or facts.word("quant_algo") or ""
    bits = facts.count("bits", "w_bit", most=64) or 0
    if not bits and facts.flag("load_in_4bit"):
        bits = 4
    return (f"{method} {bits}-bit" if bits else method).strip(), bits


def _experts(facts: _Facts) -> int | None:
    return facts.count("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts") or None


def _labels(facts: _Facts) -> int | None:
    """How many classes a classifier tells apart; one is a rank."""
    named: Any = facts.raw.get("id2label")
    if isinstance(named, Mapping) and named:
        return len(cast("Mapping[str, Any]", named))
    return facts.count("num_labels")


def _class(facts: _Facts) -> str | None:
    listed = facts.raw.get("architectures")
    if isinstance(listed, list) and listed and isinstance(listed[0], str):
        return listed[0][:MAX_LINE]
    return facts.word("_class_name")


def _attention(facts: _Facts, layers: int) -> tuple[dict[str, Any], list[int] | None]:
    """What shapes the cache beyond head counts, and the layers that have one (None: all)."""
    found: dict[str, Any] = {}
    rank = facts.count("kv_lora_rank")
    if rank:
        found |= {"kv_lora_rank": rank, "key_length_mla": rank, "value_length_mla": rank}
    cached: list[int] | None = None
    types = facts.raw.get("layer_types") or facts.raw.get("layers_block_type")
    if isinstance(types, list):
        words = [str(word) for word in cast("list[object]", types)[:layers]]
        if len(words) != layers:
            unusable("config.json", f"it tells {len(words)} kinds of layers for {layers} layers")
        found["sliding_window_pattern"] = [int("sliding" in word or "chunked" in word) for word in words]
        without = [n for n, word in enumerate(words) if "linear" in word or "mamba" in word or "recurrent" in word]
        if without:
            cached = [n for n in range(layers) if n not in set(without)]
    elif facts.count("sliding_window_pattern"):
        found["sliding_window_pattern"] = facts.count("sliding_window_pattern")
    elif facts.count("sliding_window"):
        found["sliding_window_pattern"] = [1] * layers
    return found, cached


class _Facts:
    """Typed access to a config; a number that is none is refused."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def count(self, *keys: str, most: int = _LARGE) -> int | None:
        """The first of these keys that has a number."""
        for key in keys:
            value = self.raw.get(key)
            if value is None or isinstance(value, (list, dict)):  # some models give one for each part
                continue
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if type(value) is not int or not 0 <= value <= most:
                unusable("config.json", f"its {key!r} is {str(value)[:40]!r}, not a count up to {most}")
            return value
        return None

    def flag(self, key: str) -> bool | None:
        value = self.raw.get(key)
        return value if isinstance(value, bool) else None

    def word(self, key: str) -> str | None:
        value = self.raw.get(key)
        return value[:MAX_LINE] if isinstance(value, str) and value else None

    def nested(self, *keys: str) -> Mapping[str, Any] | None:
        for key in keys:
            value = self.raw.get(key)
            if isinstance(value, dict):
                return cast("dict[str, Any]", value)
        return None
