"""The picture engine: turns a diffusion model and settings into a launch plan for stable-diffusion.cpp; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pierhead.config import Settings
from pierhead.engines import gpus, serving
from pierhead.engines.base import EngineFacts, Environment, ImageRecipe, LaunchSpec, Limits, Plan, PlanRequest
from pierhead.engines.diffusion_settings import FAMILIES, PARTS, SCHNELL, TABLE, Family
from pierhead.errors import RuntimeUnavailable, UsageError
from pierhead.formats.pictures import TYPE
from pierhead.formats.pictures_estimate import estimate, usual_pixels
from pierhead.store.model import ModelFile

MIB = 1 << 20
SERVES = ("images", "image-edits", "image-variations")
# All that serving needs. cyllama has stable-diffusion.cpp compiled in; it needs nothing else.
PINS = (
    *("cyllama==0.2.18", "numpy==2.4.6", "pillow==13.0.0", "python-multipart==0.0.34", "starlette==1.10.0"),
    *("uvicorn==0.54.0", "anyio==4.16.0", "click==8.5.1", "h11==0.16.0", "idna==3.20", "typing-extensions==4.16.0"),
)
WHEELS = Environment(PINS, dependencies=False)
# The same library with the code for Vulkan, which finds the loader and the driver on the machine.
VULKAN = Environment(("cyllama-vulkan==0.2.18", *PINS[1:]), dependencies=False)
ON_GPU = 512 * MIB  # of a GPU's memory beside weights and work; not measured
FACTS = EngineFacts(
    name="stable-diffusion",
    title="stable-diffusion.cpp",
    formats=("safetensors", "gguf"),
    serves=SERVES,
    accelerators=("cpu", "vulkan"),
    platforms=("linux/amd64",),
    common=("threads",),
    metrics={"running": "sd_requests_running", "waiting": "sd_requests_waiting"},
    pictures="only",
    untested="published weights: no model hub is reached by the project's tests, which make small random ones "
    "of FLUX's shape; and Vulkan on a GPU",
)


def make(settings: Settings) -> Diffusion:
    """The engine as the configuration wants it."""
    return Diffusion(settings.runtime.base_image)


class Diffusion:
    """Makes pictures with models of the Stable Diffusion and FLUX families, in one file or several."""

    name = FACTS.name
    facts = FACTS

    def __init__(self, base_image: str = "") -> None:
        self._base_image = base_image

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether there are weights that a painter may have; the model's summary tells whether it is one."""
        names = {f.name for f in files}
        return "model_index.json" not in names and bool(_weights(files))

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``."""
        return ("images",)

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings in canonical form; UsageError names an unknown one with its closest match."""
        return TABLE.canonical(settings)

    def defaults(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What holds where nobody says anything."""
        return TABLE.defaults

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        if request.metadata.get("type") != TYPE:
            raise UsageError(
                f"'{request.model}' does not make pictures", hint=f"`pier inspect {request.model}` shows what it is."
            )
        if request.processor and not request.processor & {"avx2", "asimd"}:
            raise RuntimeUnavailable(
                "the wheel of stable-diffusion.cpp needs a processor with AVX2, which this one lacks",
                hint="Serve it from another machine; `[engines.NAME]` takes a program that you built yourself.",
            )
        settings = TABLE.defaults | TABLE.canonical(request.settings)
        family = FAMILIES.get(str(request.metadata.get("architecture")), Family(1024, 20, 7.0))
        told = self._told(request, settings, family)
        needed = estimate(
            request.metadata,
            pixels=told["max_pixels"],
            type=settings["type"],
            flash=settings["flash_attention"],
            tiling=settings["vae_tiling"],
        )
        if request.free_memory and needed.total > request.free_memory:
            raise serving.too_large(
                request.model,
                {"weights": needed.weights, "one picture": needed.compute, "program": needed.overhead},
                request.free_memory,
                hint="Try --option max-pixels=262144, --option flash-attention=on, --option vae-tiling=on, "
                "--option type=q4_0, or stop another model.",
                **needed.to_dict(),
            )
        taken, visible = _taken(request, settings, needed.weights + needed.compute + ON_GPU)
        environment = VULKAN if visible else WHEELS
        spec = LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=serving.command(told, "diffusion"),
            env=serving.ENV,
            model_dir=str(request.model_dir),
            entry=str(serving.PROGRAMS),
            environment=environment,
            image=ImageRecipe(
                self.name, self._base_image, environment.requirements, serving.program_files("diffusion")
            ),
            devices=visible,
            limits=Limits(memory=needed.total * 5 // 4 + 512 * MIB),
            serves=SERVES,
        )
        return Plan(spec=spec, context=0, memory=needed.total, devices=taken)

    def _told(self, request: PlanRequest, settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
        """What the server program is told (``programs.diffusion.settings``)."""
        same = ("guidance", "clip_skip", "sampler", "scheduler", "strength", "edits", "max_n", "queue", "type", "mmap")
        width, height, most = _sizes(request, settings, family)
        steps = SCHNELL if request.metadata.get("distilled") else family.steps
        return {
            "name": request.model,
            "files": _files(request, settings),
            **{name: settings[name] for name in (*same, "flash_attention", "max_steps")},
            "vae_tiling": {"true": "on", "false": "off"}.get(settings["vae_tiling"], "auto"),
            "steps": min(settings["steps"] or steps, settings["max_steps"]),
            "cfg_scale": family.cfg_scale if settings["cfg_scale"] < 0 else settings["cfg_scale"],
            "width": width,
            "height": height,
            "multiple": family.unit,
            "max_pixels": most,
            "max_body": settings["max_body_mb"] * MIB,
            "threads": settings["threads"] or max(1, request.cpus),
            **({"device": "vulkan"} if settings["device"] == "vulkan" else {}),
        }


def _taken(request: PlanRequest, settings: Mapping[str, Any], need: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """What is claimed of NVIDIA's GPU, and what is made visible; of others' memory nobody knows."""
    if settings["device"] != "vulkan":
        return {}, ()
    taken = gpus.take(request.model, request.devices, need, among=settings["gpus"])
    return taken, gpus.visible(taken, ("intel.com/gpu=all",))


def _sizes(request: PlanRequest, settings: Mapping[str, Any], family: Family) -> tuple[int, int, int]:
    """Width, height and most pixels; what is set for one of them does not exceed another."""
    width, height = settings["width"] or family.side, settings["height"] or family.side
    for name, side in (("width", width), ("height", height)):
        if side % family.unit:
            raise UsageError(
                f"the {name} of pictures of '{request.model}' cannot be {side}",
                hint=f"Choose a multiple of {family.unit}.",
            )
    most = settings["max_pixels"] or max(usual_pixels(str(request.metadata.get("architecture"))), width * height)
    if width * height > most and not (settings["width"] or settings["height"]):
        width = height = max(family.unit, int(most**0.5) // family.unit * family.unit)
    if width * height > most:
        raise UsageError(
            f"{width}x{height} pixels of '{request.model}' are more than max-pixels={most}",
            hint="Choose a larger --option max-pixels, or a smaller width and height.",
        )
    return width, height, most


# --- the model --------------------------------------------------------------------------------------------------------


def _weights(files: tuple[ModelFile, ...]) -> list[str]:
    return sorted(f.name for f in files if f.role == "weights" and f.format in FACTS.formats)


def _files(request: PlanRequest, settings: Mapping[str, Any]) -> dict[str, str]:
    """Which file is which part: as its tensors say, unless a setting names it."""
    parts: dict[str, Any] = dict(request.metadata.get("parts") or {})
    found = {part: str(parts[part]["file"]) for part in PARTS if part in parts}
    there = _weights(request.files)
    for part in PARTS:
        wanted = settings[part]
        if wanted and wanted not in there:
            raise UsageError(f"the model '{request.model}' has no file '{wanted}'", hint=f"It has: {', '.join(there)}.")
        if wanted:
            found[part] = wanted
    holds = set(parts.get("diffusion", {}).get("holds") or ())
    if not holds - {"diffusion"}:
        _complete(request, found)
        return found
    return {("model" if part == "diffusion" else part): name for part, name in found.items()}


def _complete(request: PlanRequest, found: Mapping[str, str]) -> None:
    """A painter alone understands no words and makes no pixels: say which parts are missing."""
    missing: list[str] = []
    if not found.keys() & {"clip_l", "clip_g", "t5xxl", "llm"}:
        missing.append("a text encoder (clip_l, clip_g, t5xxl or llm)")
    if not found.keys() & {"vae", "taesd"} and request.metadata.get("architecture") != "chroma_radiance":
        missing.append("a decoder (vae or taesd)")
    if missing:
        raise UsageError(
            f"'{request.model}' is not whole: {' and '.join(missing)} is missing",
            hint="Put all its files into one folder and type `pier package FOLDER NAME`.",
        )
