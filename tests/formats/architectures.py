"""Small models of many architectures that llama.cpp really loads; their weights are holes in sparse files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conftest import ARRAY, I32, Maker, TensorSpec, Typed

F32, F16 = 0, 1
VOCABULARY = 2048
Model = tuple[str, dict[str, Any], list[TensorSpec]]


def vector(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, shape, F32)


def matrix(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, shape, F16)


def tokenizer() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - len(tokens))]
    tokens += [f"w{number}" for number in range(VOCABULARY - len(tokens))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * VOCABULARY,
        "tokenizer.ggml.token_type": Typed(ARRAY, kinds, I32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write(path: Path, model: Model) -> Path:
    architecture, own, tensors = model
    common = {"context_length": 32768, "attention.layer_norm_rms_epsilon": 1e-5}
    metadata = {
        "general.architecture": architecture,
        "general.file_type": 1,
        **{f"{architecture}.{key}": value for key, value in {**common, **own}.items()},
        **tokenizer(),
    }
    placed: list[TensorSpec] = []
    end = 0
    for tensor in tensors:
        placed.append(TensorSpec(tensor.name, tensor.shape, tensor.type, end))
        end = -(-(end + tensor.nbytes) // 32) * 32
    header = Maker(metadata=list(metadata.items()), tensors=placed, data=False).build()
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    return path


def outside(width: int, *, output: bool = True) -> list[TensorSpec]:
    tensors = [matrix("token_embd.weight", width, VOCABULARY), vector("output_norm.weight", width)]
    return [*tensors, matrix("output.weight", width, VOCABULARY)] if output else tensors


def attention(at: str, width: int, heads: int, heads_kv: int, head: int) -> list[TensorSpec]:
    return [
        vector(f"{at}.attn_norm.weight", width),
        matrix(f"{at}.attn_q.weight", width, heads * head),
        matrix(f"{at}.attn_k.weight", width, heads_kv * head),
        matrix(f"{at}.attn_v.weight", width, heads_kv * head),
        matrix(f"{at}.attn_output.weight", heads * head, width),
    ]


def feed_forward(at: str, width: int, hidden: int) -> list[TensorSpec]:
    return [
        vector(f"{at}.ffn_norm.weight", width),
        matrix(f"{at}.ffn_gate.weight", width, hidden),
        matrix(f"{at}.ffn_up.weight", width, hidden),
        matrix(f"{at}.ffn_down.weight", hidden, width),
    ]


def experts(at: str, width: int, hidden: int, count: int) -> list[TensorSpec]:
    return [
        vector(f"{at}.ffn_gate_inp.weight", width, count),
        matrix(f"{at}.ffn_gate_exps.weight", width, hidden, count),
        matrix(f"{at}.ffn_up_exps.weight", width, hidden, count),
        matrix(f"{at}.ffn_down_exps.weight", hidden, width, count),
    ]


def shape(layers: int, width: int, hidden: int, heads: int, heads_kv: Any, head: int) -> dict[str, Any]:
    return {
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": heads_kv,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
    }


def narrow_llama() -> Model:
    """Attention is wider than the feed-forward step."""
    tensors = outside(256)
    for layer in range(3):
        tensors += attention(f"blk.{layer}", 256, 16, 4, 64) + feed_forward(f"blk.{layer}", 256, 128)
    return "llama", shape(3, 256, 128, 16, 4, 64), tensors


def deci() -> Model:
    """Every layer has its own number of KV heads."""
    counts = [8, 2, 4, 1]
    tensors = outside(512)
    for layer, heads_kv in enumerate(counts):
        tensors += attention(f"blk.{layer}", 512, 8, heads_kv, 64) + feed_forward(f"blk.{layer}", 512, 1024)
    lists = {"attention.head_count": [8] * 4, "feed_forward_length": [1024] * 4}
    return "deci", {**shape(4, 512, 1024, 8, counts, 64), **lists}, tensors


def gemma2() -> Model:
    """Every second layer keeps a window."""
    tensors = outside(512, output=False)
    for layer in range(4):
        at = f"blk.{layer}"
        tensors += attention(at, 512, 4, 2, 128) + feed_forward(at, 512, 2048)
        tensors += [vector(f"{at}.post_attention_norm.weight", 512), vector(f"{at}.post_ffw_norm.weight", 512)]
    window = {
        "attention.sliding_window": 1024,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    return "gemma2", {**shape(4, 512, 2048, 4, 2, 128), **window}, tensors


def gpt_oss() -> Model:
    """Windows and experts."""
    width, heads, heads_kv, head, hidden, count = 512, 8, 2, 64, 512, 8
    tensors = outside(width)
    for layer in range(4):
        at = f"blk.{layer}"
        tensors += attention(at, width, heads, heads_kv, head) + experts(at, width, hidden, count)
        sizes = {"q": heads * head, "k": heads_kv * head, "v": heads_kv * head, "output": width}
        tensors += [vector(f"{at}.attn_{name}.bias", size) for name, size in sizes.items()]
        tensors += [vector(f"{at}.post_attention_norm.weight", width), vector(f"{at}.attn_sinks.weight", heads)]
        tensors += [vector(f"{at}.ffn_gate_inp.bias", count), vector(f"{at}.ffn_down_exps.bias", width, count)]
        tensors += [vector(f"{at}.ffn_{name}_exps.bias", hidden, count) for name in ("gate", "up")]
    own = {
        "expert_count": count,
        "expert_used_count": 4,
        "expert_feed_forward_length": hidden,
        "attention.sliding_window": 128,
    }
    return "gpt-oss", {**shape(4, width, hidden, heads, heads_kv, head), **own}, tensors


def qwen3moe() -> Model:
    """Experts whose answers are wider than their hidden vectors; the dense width of the metadata is unused."""
    width, heads, heads_kv, head, hidden, count = 512, 8, 2, 64, 128, 16
    tensors = outside(width)
    for layer in range(2):
        at = f"blk.{layer}"
        tensors += attention(at, width, heads, heads_kv, head) + experts(at, width, hidden, count)
        tensors += [vector(f"{at}.ffn_norm.weight", width)]
        tensors += [vector(f"{at}.attn_{name}_norm.weight", head) for name in "qk"]
    own = {"expert_count": count, "expert_used_count": 8, "expert_feed_forward_length": hidden}
    return "qwen3moe", {**shape(2, width, 6144, heads, heads_kv, head), **own}, tensors


def deepseek(*, compressed: bool) -> Model:
    """Multi-head latent attention, in today's conversion (``compressed``) and in the older one."""
    width, heads, hidden, rank, q_rank, rope, plain, value = 512, 8, 1024, 128, 192, 32, 64, 64
    tensors = outside(width)
    for layer in range(3):
        at = f"blk.{layer}"
        tensors += feed_forward(at, width, hidden)
        tensors += [vector(f"{at}.attn_norm.weight", width), vector(f"{at}.attn_kv_a_norm.weight", rank)]
        tensors += [matrix(f"{at}.attn_q_a.weight", width, q_rank), vector(f"{at}.attn_q_a_norm.weight", q_rank)]
        tensors += [matrix(f"{at}.attn_q_b.weight", q_rank, heads * (plain + rope))]
        tensors += [matrix(f"{at}.attn_kv_a_mqa.weight", width, rank + rope)]
        tensors += [matrix(f"{at}.attn_output.weight", heads * value, width)]
        if compressed:
            tensors += [matrix(f"{at}.attn_k_b.weight", plain, rank, heads)]
            tensors += [matrix(f"{at}.attn_v_b.weight", rank, value, heads)]
        else:
            tensors += [matrix(f"{at}.attn_kv_b.weight", rank, heads * (plain + value))]
    own: dict[str, Any] = shape(3, width, hidden, heads, heads, plain + rope)
    own |= {"attention.value_length": value, "rope.dimension_count": rope, "leading_dense_block_count": 3}
    own |= {"attention.kv_lora_rank": rank, "attention.q_lora_rank": q_rank}
    own |= {"expert_count": 8, "expert_used_count": 2, "expert_shared_count": 1}
    own |= {"expert_feed_forward_length": 128, "expert_weights_scale": 1.0}
    if compressed:
        own |= {"attention.head_count_kv": 1, "attention.key_length": rank + rope, "attention.value_length": rank}
        own |= {"attention.key_length_mla": plain + rope, "attention.value_length_mla": value}
    return "deepseek2", own, tensors


def mamba() -> Model:
    """No cache, only state."""
    width, inner, state, kernel, rank = 512, 1024, 16, 4, 32
    tensors = outside(width)
    for layer in range(4):
        at = f"blk.{layer}"
        tensors += [vector(f"{at}.attn_norm.weight", width), matrix(f"{at}.ssm_in.weight", width, 2 * inner)]
        tensors += [vector(f"{at}.ssm_conv1d.weight", kernel, inner), vector(f"{at}.ssm_conv1d.bias", inner)]
        tensors += [matrix(f"{at}.ssm_x.weight", inner, rank + 2 * state), vector(f"{at}.ssm_dt.weight", rank, inner)]
        tensors += [vector(f"{at}.ssm_dt.bias", inner), vector(f"{at}.ssm_a", state, inner)]
        tensors += [vector(f"{at}.ssm_d", inner), matrix(f"{at}.ssm_out.weight", inner, width)]
    own = {"block_count": 4, "embedding_length": width, "feed_forward_length": 0, "attention.head_count": 0}
    own |= {"ssm.conv_kernel": kernel, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": rank}
    return "mamba", own, tensors


def lfm2() -> Model:
    """Short convolutions with one attention layer among them."""
    width, heads, head, hidden = 512, 8, 64, 1536
    counts = [0, 0, 4, 0]
    tensors = [matrix("token_embd.weight", width, VOCABULARY), vector("token_embd_norm.weight", width)]
    tensors += [matrix("output.weight", width, VOCABULARY)]
    for layer, heads_kv in enumerate(counts):
        at = f"blk.{layer}"
        tensors += feed_forward(at, width, hidden)
        if heads_kv:
            tensors += attention(at, width, heads, heads_kv, head)
            tensors += [vector(f"{at}.attn_{name}_norm.weight", head) for name in "qk"]
            continue
        tensors += [vector(f"{at}.attn_norm.weight", width), vector(f"{at}.shortconv.conv.weight", 3, width)]
        tensors += [matrix(f"{at}.shortconv.in_proj.weight", width, 3 * width)]
        tensors += [matrix(f"{at}.shortconv.out_proj.weight", width, width)]
    own = {**shape(4, width, hidden, heads, counts, head), "shortconv.l_cache": 3, "vocab_size": VOCABULARY}
    return "lfm2", {**own, "rope.freq_base": 1e6}, tensors


MODELS: dict[str, Callable[[], Model]] = {
    "llama with wide attention": narrow_llama,
    "deci with KV heads per layer": deci,
    "gemma2 with windows": gemma2,
    "gpt-oss with windows and experts": gpt_oss,
    "qwen3moe with experts": qwen3moe,
    "deepseek2 with a compressed cache": lambda: deepseek(compressed=True),
    "deepseek2 of an older conversion": lambda: deepseek(compressed=False),
    "mamba with state": mamba,
    "lfm2 with short convolutions": lfm2,
}
