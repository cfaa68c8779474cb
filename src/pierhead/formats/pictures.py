"""Models that make pictures: which family a set of tensors is, and which file of a split model is which part.

Source: what stable-diffusion.cpp looks for in the names and shapes of a model's tensors. Such files have no config
beside them, and many GGUF ones have no metadata, so that the tensors alone tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pierhead.formats import safetensors
from pierhead.formats.reading import File, Reading, unusable

TYPE = "diffusion"  # the summary's ``type`` of such a model
PARTS = ("diffusion", "clip_l", "clip_g", "t5xxl", "llm", "vae", "taesd")
MAX_FILES = 16
Shapes = Mapping[str, tuple[int, ...]]  # by name, in the order of PyTorch (slowest first)
# A piece of a tensor's name → the family that has it; the first that is found counts.
_FAMILIES = (
    ("nerf_final_layer_conv.", "chroma_radiance"),
    ("joint_blocks.0.context_block.", "sd3"),
    ("transformer_blocks.0.img_mod.1.weight", "qwen_image"),
    ("llm_adapter.blocks.0.cross_attn.q_proj.weight", "anima"),
    ("double_blocks.0.img_mlp.gate_proj.weight", "ovis_image"),
    ("cap_embedder.0.weight", "z_image"),
    ("layers.0.adaLN_sa_ln.weight", "ernie_image"),
    ("double_stream_modulation_img.lin.weight", "flux2"),
    ("distilled_guidance_layer.in_proj.weight", "chroma"),
    ("double_blocks.0.img_attn.qkv.weight", "flux"),
)
_UNET = "input_blocks.0.0.weight"
_ATTENDS = "attn2.to_k.weight"  # of a U-Net's blocks: how wide the text is that it looks at
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl"}
_TEXT = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.", "te.")
_VAE = ("first_stage_model.", "vae.", "tae.")


class Tensors(NamedTuple):
    """What one file holds: shapes by name, bytes by type, and how many numbers."""

    file: str
    shapes: Shapes
    share: Mapping[str, int]
    elements: int


def family(shapes: Shapes) -> str:
    """The kind of model that paints; "" where these tensors do not."""
    if not any(".weight" in name and ("blocks." in name or "layers." in name) for name in shapes):
        return ""
    for piece, found in _FAMILIES:
        if any(_is(name, piece) for name in shapes):
            return found
    if not any(_is(name, _UNET) for name in shapes):
        return ""
    width = next((shape[-1] for name, shape in shapes.items() if name.endswith(_ATTENDS) and len(shape) == 2), 0)
    return _WIDTHS.get(width, "sd1")


def part(shapes: Shapes) -> str:
    """What a file is for in a split model, one of ``PARTS``; "" where that cannot be told."""
    if family(shapes):
        return "diffusion"
    for tell in (_text, _decoder, _llm):
        if found := tell(shapes):
            return found
    return ""


def holds(shapes: Shapes) -> list[str]:
    """Which of ``diffusion``, ``text`` and ``vae`` a file that paints has inside."""
    inside = {"text": _TEXT, "vae": _VAE}
    return ["diffusion", *(word for word, starts in inside.items() if any(n.startswith(starts) for n in shapes))]


def read(files: Sequence[File], gguf: Callable[[File], Reading[Any]]) -> Reading[dict[str, Any] | None]:
    """The summary of a picture model whose parts are of several formats; None where they are something else.

    ``gguf`` reads the header of a GGUF file. A file that is neither the painter nor another part ends it early.
    """
    if not 0 < len(files) <= MAX_FILES or any(f.format not in ("gguf", "safetensors") for f in files):
        return None
    found: list[Tensors] = []
    for file in files:
        tensors = yield from (_safetensors(file) if file.format == "safetensors" else _gguf(file, gguf))
        if not part(tensors.shapes):
            return None
        found.append(tensors)
    return summary(found, files[0].format)


def summary(found: Sequence[Tensors], format: str) -> dict[str, Any] | None:
    """See ``read``; ``parts`` tells for each part its file, its bytes and, of the painter, what it ``holds``."""
    painter = next((one for one in found if family(one.shapes)), None)
    if painter is None:
        return None
    parts: dict[str, dict[str, Any]] = {}
    share: dict[str, int] = {}
    for one in found:
        kind = part(one.shapes)
        if not kind:
            continue  # nothing that this program knows the use of
        if kind in parts:
            unusable("model", f"{parts[kind]['file']} and {one.file} are both its {kind}", "Package one of them.")
        size = sum(one.share.values())
        parts[kind] = {"file": one.file, "bytes": size} | ({"holds": holds(one.shapes)} if one is painter else {})
        for word, count in one.share.items():
            share[word] = share.get(word, 0) + count
    return {
        "format": format,
        "version": None,
        "architecture": family(painter.shapes),
        "name": None,
        "license": None,
        "size_label": None,
        "type": TYPE,
        "parameters": sum(one.elements for one in found),
        "quantization": max(share, key=lambda word: share[word], default="unknown"),
        "dtypes": share,
        "weights_bytes": sum(share.values()),
        "tensor_count": sum(len(one.shapes) for one in found),
        "split_count": 1,
        "shards_read": 1,
        "distilled": _distilled(painter.shapes),
        "hidden": _hidden(painter.shapes),
        "parts": parts,
        "layers": 0,
        "context_length": None,
        "chat_template": None,
        "state": {},
        "per_layer": [],
        "other": {},
    }


# --- by names ---------------------------------------------------------------------------------------------------------


def _is(name: str, piece: str) -> bool:
    return name in (piece, f"model.diffusion_model.{piece}") or name.startswith(
        (piece, f"model.diffusion_model.{piece}")
    )


def _text(shapes: Shapes) -> str:
    if any(name.startswith(("encoder.block.0.", "enc.blk.0.")) for name in shapes):
        return "t5xxl"
    embedding = next((s for n, s in shapes.items() if n.endswith("text_model.embeddings.token_embedding.weight")), ())
    return {768: "clip_l", 1280: "clip_g"}.get(embedding[-1] if embedding else 0, "")


def _decoder(shapes: Shapes) -> str:
    names = [name.removeprefix("first_stage_model.").removeprefix("vae.").removeprefix("tae.") for name in shapes]
    if any(name.startswith("decoder.layers.0.") for name in names):
        return "taesd"
    return "vae" if any(name.startswith(("decoder.conv_in.", "decoder.conv1.")) for name in names) else ""


def _llm(shapes: Shapes) -> str:
    """A language model that reads the prompt (Qwen-Image, Z-Image, FLUX.2)."""
    first = ("model.layers.0.self_attn.q_proj.", "blk.0.attn_q.", "model.language_model.layers.0.self_attn.q_proj.")
    return "llm" if any(name.startswith(first) for name in shapes) else ""


def _distilled(shapes: Shapes) -> bool:
    """A FLUX without guidance was made to need few steps (schnell)."""
    return family(shapes) == "flux" and not any("guidance_in.in_layer.weight" in name for name in shapes)


def _hidden(shapes: Shapes) -> int:
    """How wide the painter's blocks are, where its first layer tells."""
    for piece in ("txt_in.weight", "x_embedder.proj.weight", _UNET, "x_embedder.weight", "img_in.weight"):
        for name, shape in shapes.items():
            if _is(name, piece) and shape:
                return shape[0]
    return 0


# --- headers ----------------------------------------------------------------------------------------------------------


def _safetensors(file: File) -> Reading[Tensors]:
    return of_safetensors(file.name, (yield from safetensors.read_header(file)))


def of_safetensors(name: str, header: safetensors.Header) -> Tensors:
    """The tensors of a safetensors header."""
    share: dict[str, int] = {}
    for one in header.tensors:
        share[one.dtype] = share.get(one.dtype, 0) + one.nbytes
    shapes = {one.name: one.shape for one in header.tensors}
    return Tensors(name, shapes, share, sum(one.elements for one in header.tensors))


def _gguf(file: File, read_header: Callable[[File], Reading[Any]]) -> Reading[Tensors]:
    return of_gguf(file.name, (yield from read_header(file)))


def of_gguf(name: str, header: Any) -> Tensors:
    """The tensors of a GGUF header (``gguf_parser.Header``), whose shapes are the other way round."""
    share: dict[str, int] = {}
    for one in header.tensors:
        share[one.type.name] = share.get(one.type.name, 0) + one.nbytes
    shapes = {one.name: tuple(reversed(one.shape)) for one in header.tensors}
    return Tensors(name, shapes, share, sum(one.elements for one in header.tensors))
