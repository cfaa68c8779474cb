"""Models that make pictures are known by their tensors, in one file or in several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.engines import tiny_pictures
from tests.engines.tiny_pictures import Shape

from pierhead.errors import CorruptData
from pierhead.formats import pictures
from pierhead.formats.pictures_estimate import estimate
from pierhead.formats.reading import File
from pierhead.formats.summarize import summarize

MIB = 1 << 20
UNET: dict[str, Shape] = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
}


def summary(folder: Path, *names: str) -> dict[str, Any]:
    files = [File(n, (folder / n).stat().st_size, "weights", n.rpartition(".")[2]) for n in names]
    return summarize(files, {n: folder / n for n in names})


def test_a_model_in_several_files_is_one_with_parts(tmp_path: Path) -> None:
    tiny_pictures.model(tmp_path)
    found = summary(tmp_path, "clip_l.gguf", "flux-tiny.gguf", "taef1.gguf")
    assert (found["type"], found["architecture"], found["hidden"]) == ("diffusion", "flux", 128)
    assert {part: told["file"] for part, told in found["parts"].items()} == {
        "diffusion": "flux-tiny.gguf",
        "clip_l": "clip_l.gguf",
        "taesd": "taef1.gguf",
    }
    assert found["weights_bytes"] == sum(told["bytes"] for told in found["parts"].values())
    assert found["distilled"], "it has no guidance, so few steps are enough"


def test_a_painter_without_metadata_is_known_by_its_tensors(tmp_path: Path) -> None:
    tiny_pictures.write(tmp_path / "model.gguf", tiny_pictures.flux())
    assert summary(tmp_path, "model.gguf")["parts"]["diffusion"]["holds"] == ["diffusion"]


def test_two_files_of_the_same_part_are_refused_by_name(tmp_path: Path) -> None:
    tiny_pictures.write(tmp_path / "a.gguf", tiny_pictures.flux(), "flux")
    for name in ("one.gguf", "two.gguf"):
        tiny_pictures.write(tmp_path / name, tiny_pictures.taesd())
    with pytest.raises(CorruptData, match=r"one\.gguf and two\.gguf are both its taesd"):
        summary(tmp_path, "a.gguf", "one.gguf", "two.gguf")


@pytest.mark.parametrize(
    ("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl")], ids=["SD 1", "SD 2", "SDXL"]
)
def test_a_checkpoint_s_text_tells_its_family(width: int, family: str) -> None:
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert pictures.family({**UNET, name: (320, width)}) == family


def test_a_checkpoint_says_what_it_has_inside() -> None:
    whole: Mapping[str, Shape] = {
        **UNET,
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    }
    assert pictures.holds(whole) == ["diffusion", "text", "vae"]
    assert pictures.part(whole) == "diffusion"


def test_a_model_that_writes_is_none_that_paints() -> None:
    writes = {"blk.0.attn_q.weight": (576, 576), "token_embd.weight": (49152, 576)}
    assert pictures.family(writes) == ""
    assert pictures.part(writes) == "llm"
    assert pictures.family({"bert.encoder.layers.0.attention.weight": (3, 3)}) == ""


def told(**more: Any) -> dict[str, Any]:
    return {"weights_bytes": 2000 * MIB, "parameters": 1000 * MIB, "parts": {}, **more}


@pytest.mark.parametrize(
    ("metadata", "flash", "recorded"),
    [
        ({"architecture": "sd1"}, False, {256: 49.57, 512: 559.90, 1024: 8360.93, 1536: 41842.65}),
        ({"architecture": "sdxl"}, False, {512: 132.05, 1024: 830.86, 1536: 3607.58, 1792: 6484.95}),
        ({"architecture": "sdxl"}, True, {512: 132.05, 1024: 440.86, 1536: 1110.08, 1792: 1554.33}),
        ({"architecture": "sd3", "hidden": 1536}, False, {1024: 1786.11, 1536: 8319.03, 1792: 15141.18}),
        ({"architecture": "sd3", "hidden": 2432}, False, {1024: 2865.44, 1536: 13258.86, 1792: 24091.01}),
        ({"architecture": "flux", "hidden": 3072}, False, {1024: 2576.18, 1536: 10021.49, 1792: 17434.95}),
    ],
    ids=["SD 1.5", "SDXL", "SDXL with flash attention", "SD 3 medium", "SD 3.5 large", "FLUX.1"],
)
def test_the_painter_s_work_is_never_far_below_and_seldom_far_above_what_the_library_logs(
    metadata: dict[str, Any], flash: bool, recorded: dict[int, float]
) -> None:
    for side, buffer in recorded.items():
        found = estimate(told(**metadata), pixels=side * side, flash=flash)
        assert 0.97 <= found.paint / (buffer * MIB) <= 1.25, side


def test_a_decoder_in_tiles_or_a_small_one_needs_less_and_fewer_bits_too() -> None:
    large = estimate(told(), pixels=1 << 20, tiling="false")
    assert large.decode > 6000 * MIB
    assert estimate(told(), pixels=1 << 20, tiling="auto").decode < 1800 * MIB
    assert estimate(told(), pixels=1 << 20, tiling="true").decode < 500 * MIB
    assert estimate(told(parts={"taesd": {}}), pixels=1 << 20, tiling="false").decode < large.decode / 3
    assert estimate(told(), pixels=1 << 20, type="q4_0").weights == 1000 * MIB * 4.5 / 8
