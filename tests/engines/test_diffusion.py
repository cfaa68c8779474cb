"""The picture engine's plans and settings, and which engine a model goes to that paints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.engines import tiny_pictures

from pierhead.config import Settings
from pierhead.engines.base import PlanRequest
from pierhead.engines.diffusion import Diffusion
from pierhead.engines.diffusion_settings import PARTS, SAMPLERS, SCHEDULERS, TYPES
from pierhead.engines.gpus import Device
from pierhead.engines.programs.diffusion import asks, painter
from pierhead.engines.programs.diffusion.faults import Refused
from pierhead.engines.programs.diffusion.settings import Settings as Told
from pierhead.engines.registry import choose, engines
from pierhead.errors import OutOfMemory, RuntimeUnavailable, UsageError
from pierhead.formats.reading import File
from pierhead.formats.summarize import summarize
from pierhead.package.inputs import detect
from pierhead.store.model import ModelFile

ALL = engines(Settings())
ENGINE = Diffusion()
ONE = (ModelFile("sd15.safetensors", 4 << 30, format="safetensors"),)
SD15: dict[str, Any] = {
    "type": "diffusion",
    "architecture": "sd1",
    "weights_bytes": 4 << 30,
    "parameters": 1 << 30,
    "parts": {"diffusion": {"file": "sd15.safetensors", "bytes": 4 << 30, "holds": ["diffusion", "text", "vae"]}},
}


def request(files: tuple[ModelFile, ...] = ONE, free: int = 0, **given: Any) -> PlanRequest:
    metadata: dict[str, Any] = given.pop("metadata", SD15)
    return PlanRequest("r1", "art", Path("/models/m"), files, metadata, given, free, cpus=4)


def told(asked: PlanRequest) -> dict[str, Any]:
    argv = ENGINE.plan(asked).spec.argv
    return json.loads(argv[argv.index("--settings") + 1])


def split(folder: Path) -> tuple[tuple[ModelFile, ...], dict[str, Any]]:
    found = sorted(p for p in folder.iterdir() if p.is_file())
    files = tuple(ModelFile(p.name, p.stat().st_size, format=p.suffix[1:]) for p in found)
    return files, summarize([File(*f[:2], "weights", f[2]) for f in _of(files)], {p.name: p for p in found})


def _of(files: tuple[ModelFile, ...]) -> list[tuple[str, int, str]]:
    return [(f.name, f.size, f.format) for f in files]


# --- which engine -----------------------------------------------------------------------------------------------------


def test_a_painter_goes_to_the_picture_engine_and_a_writer_does_not() -> None:
    gguf = (ModelFile("m.gguf", 1, format="gguf"),)
    folder = (*ONE, ModelFile("config.json", 1, "config"))
    assert choose(ALL, ONE, metadata=SD15).name == "stable-diffusion"
    assert choose(ALL, gguf, metadata=SD15).name == "stable-diffusion"
    assert choose(ALL, gguf, metadata={"type": "model", "architecture": "llama"}).name == "llamacpp"
    assert choose(ALL, folder, metadata={"type": "model", "architecture": "llama"}).name == "vllm"


@pytest.mark.parametrize(("name", "metadata"), [("llamacpp", SD15), ("stable-diffusion", {"type": "model"})])
def test_the_wrong_engine_by_name_is_refused_with_the_reason(name: str, metadata: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="make") as refused:
        choose(ALL, (ModelFile("m.gguf", 1, format="gguf"),), name, "art", metadata)
    assert "pictures" in refused.value.message


def test_a_folder_of_gguf_files_that_are_parts_of_a_painter_is_one_model(tmp_path: Path) -> None:
    tiny_pictures.model(tmp_path)
    assert [f.name for f in detect(tmp_path).files] == ["clip_l.gguf", "flux-tiny.gguf", "taef1.gguf"]


# --- plans ------------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_model_are_given_by_what_they_are_for(tmp_path: Path) -> None:
    files, metadata = split(tiny_pictures.model(tmp_path))
    given = told(request(files, metadata=metadata))
    assert given["files"] == {"diffusion": "flux-tiny.gguf", "clip_l": "clip_l.gguf", "taesd": "taef1.gguf"}
    assert (given["steps"], given["cfg_scale"], given["width"], given["multiple"]) == (4, 1.0, 1024, 16)


def test_a_checkpoint_that_has_all_inside_is_given_as_one_and_its_vae_may_be_another() -> None:
    assert told(request())["files"] == {"model": "sd15.safetensors"}
    more = (*ONE, ModelFile("better-vae.safetensors", 1, format="safetensors"))
    assert told(request(more, vae="better-vae.safetensors"))["files"]["vae"] == "better-vae.safetensors"
    with pytest.raises(UsageError, match="has no file 'x'"):
        ENGINE.plan(request(vae="x"))


def test_a_painter_alone_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    tiny_pictures.write(tmp_path / "flux-tiny.gguf", tiny_pictures.flux(), "flux")
    files, metadata = split(tmp_path)
    with pytest.raises(UsageError, match=r"a text encoder \(clip_l.*and a decoder \(vae or taesd\) is missing"):
        ENGINE.plan(request(files, metadata=metadata))


def test_sizes_are_those_of_the_family_unless_set_and_fit_each_other() -> None:
    usual = told(request())
    assert (usual["width"], usual["height"], usual["max_pixels"], usual["multiple"]) == (512, 512, 768 * 512, 64)
    assert told(request(width=768, height=768))["max_pixels"] == 768 * 768
    small = told(request(max_pixels=300 * 300))
    assert (small["width"], small["height"]) == (256, 256)
    with pytest.raises(UsageError, match="more than max-pixels"):
        ENGINE.plan(request(width=1024, max_pixels=512 * 512))
    with pytest.raises(UsageError, match="cannot be 500") as refused:
        ENGINE.plan(request(width=500))
    assert "64" in (refused.value.hint or "")


def test_what_does_not_fit_is_refused_and_smaller_pictures_need_less() -> None:
    whole = ENGINE.plan(request()).memory
    assert ENGINE.plan(request(max_pixels=256 * 256)).memory < whole
    assert ENGINE.plan(request(type="q4_0")).memory < whole
    with pytest.raises(OutOfMemory, match="one picture") as refused:
        ENGINE.plan(request(free=1 << 30))
    assert "max-pixels" in (refused.value.hint or "")


def test_the_program_knows_every_word_that_a_setting_takes() -> None:
    assert {*painter.SAMPLERS, "auto"} == set(SAMPLERS)
    assert {*painter.SCHEDULERS, "auto"} == set(SCHEDULERS)
    assert set(painter.TYPES) == set(TYPES)
    assert set(told(request())) <= set(Told.__dataclass_fields__)
    assert {"diffusion", "vae"} < set(PARTS)


# --- requests ---------------------------------------------------------------------------------------------------------


def ask(**fields: Any) -> asks.Ask:
    return asks.read({"prompt": "a boat", **fields}, Told(multiple=64, max_pixels=512 * 768, max_n=4, steps=20))


def test_fields_are_read_the_same_from_json_and_from_a_form() -> None:
    by_json = ask(n=2, seed=7, steps=9, cfg_scale=2.5, size="512x768", output_format="webp")
    by_form = ask(n="2", seed="7", steps="9", cfg_scale="2.5", size="512x768", output_format="webp")
    assert by_json == by_form
    assert (by_json.n, by_json.size, by_json.job["seed"], by_json.job["steps"]) == (2, (512, 768), 7, 9)


def test_quality_is_a_number_of_steps_and_a_seed_is_chosen_where_none_is_given() -> None:
    steps = [ask(quality=word).job["steps"] for word in ("low", "medium", "high")]
    assert steps == [10, 20, 30]
    assert ask().job["seed"] != ask(seed=-1).job["seed"]
    assert ask(size="auto").size is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "long " * 1000}, "prompt"),
        ({"negative_prompt": "\0"}, "negative_prompt"),
        ({"size": "0x0"}, "size"),
        ({"size": "-64x64"}, "size"),
        ({"size": "65x64"}, "size"),
        ({"size": "9999999999x64"}, "size"),
        ({"size": "64000x64000"}, "size"),
        ({"size": "٦٤x64"}, "size"),
        ({"size": ["64x64"]}, "size"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"steps": 0}, "steps"),
        ({"steps": 1e999}, "steps"),
        ({"steps": [3]}, "steps"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
        ({"seed": -2}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"sampler": "best"}, "sampler"),
        ({"quality": "superb"}, "quality"),
        ({"output_format": "gif"}, "output_format"),
        ({"response_format": "url"}, "response_format"),
        ({"background": "transparent"}, "background"),
        ({"stream": True, "partial_images": 9}, "partial_images"),
    ],
    ids=str,
)
def test_what_cannot_be_painted_is_refused_with_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        ask(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert refused.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("size", [(16_000_000, 1), (1, 16_000_000), (4000, 4000), (512, 512), (10, 10), (100_000, 160)])
def test_no_clients_picture_makes_a_larger_one_than_is_allowed(size: tuple[int, int]) -> None:
    wide, high = asks.near(size, 64, 512 * 512)
    assert wide * high <= 512 * 512
    assert wide % 64 == high % 64 == 0
    assert min(wide, high) >= 64


def test_a_processor_that_would_break_off_is_told_before_anything_starts() -> None:
    old = PlanRequest("r", "m", Path("/m"), ONE, SD15, {}, processor=frozenset({"sse4_2", "avx"}))
    with pytest.raises(RuntimeUnavailable, match="AVX2"):
        ENGINE.plan(old)


GPU = Device(name="nvidia.com/gpu=0", title="NVIDIA L4", total=24 << 30, free=24 << 30)


def test_a_gpu_is_used_by_vulkan_where_it_is_asked_for() -> None:
    plain, seen = ENGINE.plan(request()), ENGINE.plan(replace(request(), devices=(GPU,)))
    assert seen == plain, "nobody gets it unasked"
    made = ENGINE.plan(replace(request(device="vulkan"), devices=(GPU,)))
    assert made.spec.devices == ("nvidia.com/gpu=0",)
    assert 4 << 30 < made.devices["nvidia.com/gpu=0"] < 12 << 30
    assert made.spec.environment is not None
    assert made.spec.image is not None
    assert made.spec.environment.requirements == made.spec.image.requirements
    assert any("cyllama-vulkan" in pin for pin in made.spec.image.requirements)
    assert '"device":"vulkan"' in made.spec.argv[-1]
    other = ENGINE.plan(request(device="vulkan"))
    assert other.spec.devices == ("intel.com/gpu=all",)
    assert not other.devices
    with pytest.raises(OutOfMemory):
        ENGINE.plan(replace(request(device="vulkan"), devices=(msgspec.structs.replace(GPU, free=1 << 30),)))


def test_a_painter_without_the_gpu_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    library = SimpleNamespace(__file__=str(tmp_path / "cyllama" / "sd" / "__init__.py"))
    with pytest.raises(ValueError, match="Vulkan finds no GPU here"):
        painter.check(library)
