"""A Llama of random weights in Hugging Face's layout, made in seconds where nothing can be fetched.

``python -m tests.gpu.random_llama FOLDER [small]``; the usual one has the shape of Llama 3.2 1B.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

WORDS = 32_000  # of its vocabulary: bytes, and words that are never read
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
LARGE = SMALL | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"


def make(folder: Path, shape: dict[str, int]) -> Path:
    """The model in ``folder``, which must not be there."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": WORDS,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer(folder)
    _weights(folder / "model.safetensors", dict(_tensors(shape)))
    return folder


def _tensors(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    queries, keys = (shape[f"num_{kind}_heads"] * shape["head_dim"] for kind in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (WORDS, width)
    for layer in range(shape["num_hidden_layers"]):
        head = f"model.layers.{layer}"
        yield f"{head}.input_layernorm.weight", (width,)
        yield f"{head}.post_attention_layernorm.weight", (width,)
        yield f"{head}.self_attn.q_proj.weight", (queries, width)
        yield f"{head}.self_attn.k_proj.weight", (keys, width)
        yield f"{head}.self_attn.v_proj.weight", (keys, width)
        yield f"{head}.self_attn.o_proj.weight", (width, queries)
        yield f"{head}.mlp.gate_proj.weight", (inner, width)
        yield f"{head}.mlp.up_proj.weight", (inner, width)
        yield f"{head}.mlp.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)


def _weights(place: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """As bfloat16, of which numpy has none: the upper half of a float32."""
    dice = numpy.random.default_rng(1)
    block = dice.normal(0, 0.02, 1 << 22).astype(numpy.float32).view(numpy.uint32) >> 16
    random, one = block.astype(numpy.uint16), numpy.uint16(0x3F80)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, extents in tensors.items():
        start, end = end, end + 2 * math.prod(extents)
        header[name] = {"dtype": "BF16", "shape": extents, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with place.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, extents in tensors.items():
            count = math.prod(extents)
            if name.endswith("norm.weight"):
                file.write(numpy.full(count, one, numpy.uint16).tobytes())
                continue
            at = int(dice.integers(0, 1 << 20))  # no two parts alike, without a billion throws
            while count:
                part = random[at : at + count]
                file.write(part.tobytes())
                count, at = count - len(part), 0


def _tokenizer(folder: Path) -> None:
    """A token for each byte, as GPT-2 writes them down."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    words = ["<|begin|>", "<|end|>", *letters]
    words += [f"w{number}" for number in range(WORDS - len(words))]
    same = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    made = {
        "version": "1.0",
        "added_tokens": [{"id": at, "content": words[at], **same} for at in (0, 1)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {word: at for at, word in enumerate(words)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(made))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**told, "chat_template": TEMPLATE, "model_max_length": 8192})
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]), SMALL if sys.argv[2:] == ["small"] else LARGE)
