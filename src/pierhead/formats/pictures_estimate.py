"""How much memory it takes to make a picture: weights, the painter's work and that of what makes pixels; pure.

Source: the sizes of the buffers that stable-diffusion.cpp logs, as users and gguf-parser recorded them; they follow
from the shapes. Attention without flash attention keeps one number for each pair of tokens and each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

MIB = 1 << 20
TILE = 256 * 256  # pixels that are decoded at a time where the decoder works in tiles
UNTILED = 512 * 512  # up to so many pixels tiles are not used by themselves
OVERHEAD = 208 * MIB  # two processes, the library and a prompt's text encoder at work
_DECODER, _SMALL_DECODER = 6656, 2048  # bytes for each pixel: a VAE, and a TAESD
_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5} | {
    "q6_k": 6.5625, "q5_k": 5.5, "q4_k": 4.5, "q3_k": 3.4375, "q2_k": 2.625,
}  # fmt: skip
_HEADS = {"sd1": 0, "sd2": 0, "sdxl": 0, "sd3": 64}  # how wide one head of attention is; 0: a U-Net
_HEAD = 128
_UNETS = {"sd1": (8, 1), "sd2": (8, 1), "sdxl": (10, 4)}  # heads, and pixels of the latent picture for each token
_WIDTH = 320  # channels of a U-Net at full size
_BESIDE, _ALONE = 14, 27  # rows of them that are there beside attention, and elsewhere
_BLOCKS = {"sd3": (256, 8)}  # tokens of a prompt beside the picture's, and rows of its width that a transformer keeps
_USUAL = (512, 17)


class PictureEstimate(NamedTuple):
    """Bytes: ``paint`` and ``decode`` do not happen at the same time."""

    weights: int
    paint: int
    decode: int
    overhead: int

    @property
    def compute(self) -> int:
        """The larger of what the painter and the decoder need."""
        return max(self.paint, self.decode)

    @property
    def total(self) -> int:
        """All that is there at the worst moment."""
        return self.weights + self.compute + self.overhead

    def to_dict(self) -> dict[str, int]:
        """For programs."""
        return {"weights": self.weights, "compute": self.compute, "overhead": self.overhead, "total": self.total}


def usual_pixels(family: str) -> int:
    """The largest picture where nobody says: what was trained for, or what memory it would take in a U-Net."""
    return 768 * 512 if family in ("sd1", "sd2") else 1 << 20


def estimate(
    metadata: Mapping[str, Any], *, pixels: int, type: str = "", flash: bool = False, tiling: str = "auto"
) -> PictureEstimate:
    """For pictures of up to ``pixels``; ``type`` is what the weights are turned into."""
    weights = int(metadata.get("weights_bytes") or 0)
    if type:
        weights = int(int(metadata.get("parameters") or 0) * _BITS[type] / 8)
    parts: Mapping[str, Any] = metadata.get("parts") or {}
    each = _SMALL_DECODER if "taesd" in parts else _DECODER
    whole = pixels if tiling == "false" else min(pixels, UNTILED if tiling == "auto" else TILE)
    head = _HEADS.get(str(metadata.get("architecture")), _HEAD)
    paint = _unet(metadata, pixels, flash) if not head else _transformer(metadata, pixels, head, flash)
    return PictureEstimate(weights, paint, each * whole + 8 * pixels, OVERHEAD)


def _unet(metadata: Mapping[str, Any], pixels: int, flash: bool) -> int:
    latent = pixels // 64
    heads, share = _UNETS.get(str(metadata.get("architecture")), (8, 1))
    tokens, row = latent // share, 4 * latent * _WIDTH
    return max(0 if flash else 4 * heads * tokens * tokens + row * _BESIDE, row * _ALONE)


def _transformer(metadata: Mapping[str, Any], pixels: int, head: int, flash: bool) -> int:
    text, rows = _BLOCKS.get(str(metadata.get("architecture")), _USUAL)
    tokens = pixels // 256 + text
    hidden = int(metadata.get("hidden") or 0) or 3072
    return (0 if flash else 4 * max(1, hidden // head) * tokens * tokens) + 4 * tokens * hidden * rows
