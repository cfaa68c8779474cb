"""A FLUX of one double and one single block with random weights, its CLIP-L and a TAESD, which the real library runs.

The painter is as narrow as the library lets it be (one head of 128), the text encoder has CLIP-L's own size in 4 bits,
the decoder is a TAESD for 16 channels: 80 MB in all. The pictures are noise, yet they follow prompt, seed and size.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from pathlib import Path

Shape = tuple[int, ...]
_F32, _F16, _Q4_0 = 0, 1, 2
_ALIGN = 32
_HEAD = 128


def flux(hidden: int = _HEAD) -> dict[str, Shape]:
    """The painter's tensors."""
    found: dict[str, Shape] = {}

    def linear(name: str, before: int, after: int) -> None:
        found.update({f"{name}.weight": (after, before), f"{name}.bias": (after,)})

    for name, before in (("img_in", 64), ("txt_in", 4096)):
        linear(name, before, hidden)
    for name, before in (("time_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", before, hidden)
        linear(f"{name}.out_layer", hidden, hidden)
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}_"
        linear(f"{block}mod.lin", hidden, 6 * hidden)
        linear(f"{block}attn.qkv", hidden, 3 * hidden)
        linear(f"{block}attn.proj", hidden, hidden)
        linear(f"{block}mlp.0", hidden, 4 * hidden)
        linear(f"{block}mlp.2", 4 * hidden, hidden)
        found |= {f"{block}attn.norm.{one}_norm.scale": (_HEAD,) for one in ("query", "key")}
    linear("single_blocks.0.linear1", hidden, 7 * hidden)
    linear("single_blocks.0.linear2", 5 * hidden, hidden)
    linear("single_blocks.0.modulation.lin", hidden, 3 * hidden)
    found |= {f"single_blocks.0.norm.{one}_norm.scale": (_HEAD,) for one in ("query", "key")}
    linear("final_layer.linear", hidden, 64)
    linear("final_layer.adaLN_modulation.1", hidden, 2 * hidden)
    return found


def clip_l() -> dict[str, Shape]:
    """The text encoder's tensors."""
    wide, top = 768, "text_model."
    found: dict[str, Shape] = {
        f"{top}embeddings.token_embedding.weight": (49408, wide),
        f"{top}embeddings.position_embedding.weight": (77, wide),
        f"{top}final_layer_norm.weight": (wide,),
        f"{top}final_layer_norm.bias": (wide,),
    }
    for number in range(12):
        layer = f"{top}encoder.layers.{number}."
        shapes: dict[str, Shape] = {f"self_attn.{one}_proj": (wide, wide) for one in ("q", "k", "v", "out")}
        shapes |= {"mlp.fc1": (4 * wide, wide), "mlp.fc2": (wide, 4 * wide)}
        shapes |= {"layer_norm1": (wide,), "layer_norm2": (wide,)}
        for name, shape in shapes.items():
            found |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    return found


def taesd(channels: int = 16) -> dict[str, Shape]:
    """The tensors of what makes pixels, and of what makes the painter's numbers from pixels."""
    found: dict[str, Shape] = {}

    def layer(name: str, before: int, after: int, *, bias: bool = True) -> None:
        found[f"{name}.weight"] = (after, before, 3, 3)
        found.update({f"{name}.bias": (after,)} if bias else {})

    def blocks(side: str, numbers: range) -> None:
        for number in numbers:
            for step in (0, 2, 4):
                layer(f"{side}.layers.{number}.conv.{step}", 64, 64)

    layer("decoder.layers.0", channels, 64)
    for first in (2, 7, 12):
        blocks("decoder", range(first, first + 3))
        layer(f"decoder.layers.{first + 4}", 64, 64, bias=False)
    blocks("decoder", range(17, 18))
    layer("decoder.layers.18", 64, 3)
    layer("encoder.layers.0", 3, 64)
    blocks("encoder", range(1, 2))
    for first in (2, 6, 10):
        layer(f"encoder.layers.{first}", 64, 64, bias=False)
        blocks("encoder", range(first + 1, first + 4))
    layer("encoder.layers.14", 64, channels)
    return found


def write(path: Path, tensors: Mapping[str, Shape], architecture: str = "", *, packed: bool = False) -> Path:
    """A GGUF file of random weights; ``packed`` stores matrices in 4 bits."""
    chance = random.Random(path.name)
    infos, bodies, at = b"", list[bytes](), 0
    for name, shape in tensors.items():
        kind = _Q4_0 if packed and len(shape) == 2 else _F16 if len(shape) == 4 else _F32
        infos += _text(name) + struct.pack("<I", len(shape))
        infos += b"".join(struct.pack("<Q", extent) for extent in reversed(shape)) + struct.pack("<IQ", kind, at)
        bodies.append(_padded(_numbers(name, shape, kind, chance)))
        at += len(bodies[-1])
    about = _text("general.architecture") + struct.pack("<I", 8) + _text(architecture) if architecture else b""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), bool(about)) + about + infos
    path.write_bytes(_padded(head) + b"".join(bodies))
    return path


def model(folder: Path) -> Path:
    """The whole model, in three files as people get them."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "flux-tiny.gguf", flux(), "flux")
    write(folder / "clip_l.gguf", clip_l(), "clip", packed=True)
    write(folder / "taef1.gguf", taesd())
    return folder


def _numbers(name: str, shape: Shape, kind: int, chance: random.Random) -> bytes:
    count, inputs = 1, 1
    for place, extent in enumerate(shape):
        count *= extent
        inputs *= extent if place else 1
    scale = 0.02 if "embedding" in name else 1.7 * inputs**-0.5
    if kind == _Q4_0:
        block = b"".join(struct.pack("<e", scale / 8) + chance.randbytes(16) for _ in range(1021))
        size = count // 32 * 18
        return (block * (size // len(block) + 1))[:size]
    if len(shape) == 1:
        one = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
        return struct.pack("<f", one) * count
    letter = "e" if kind == _F16 else "f"
    some = min(count, 4099)
    numbers = struct.pack(f"<{some}{letter}", *(chance.uniform(-scale, scale) for _ in range(some)))
    return (numbers * (count // some + 1))[: count * struct.calcsize(letter)]


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGN)
