"""The speech engine: turns a Whisper model and settings into a launch plan of whisper.cpp; pure, starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pierhead.config import Settings
from pierhead.engines import serving
from pierhead.engines.base import EngineFacts, Environment, ImageRecipe, LaunchSpec, Limits, Plan, PlanRequest
from pierhead.engines.whisper_settings import TABLE
from pierhead.errors import UsageError
from pierhead.formats.whisper_estimate import PIECE, WhisperEstimate, estimate_whisper
from pierhead.store.model import ModelFile

MIB = 1 << 20
# All of them, so that what the binding's own downloader needs stays out.
WHEELS = Environment(
    (
        "pywhispercpp==1.5.1",
        "av==18.1.0",
        "numpy==2.4.6",
        "msgspec==0.22.0",
        "python-multipart==0.0.34",
        "uvicorn==0.54.0",
        "httptools==0.9.0",
        "uvloop==0.23.0",
        "click==8.5.1",
        "h11==0.16.0",
    ),
    dependencies=False,
)
FACTS = EngineFacts(
    name="whisper",
    title="whisper.cpp",
    formats=("ggml",),
    serves=("transcriptions", "translations"),
    common=("parallel", "threads"),
    metrics={
        "running": "whisper_running",
        "waiting": "whisper_queue_size",
        "generated_tokens": "whisper_generated_tokens_total",
    },
    untested="finding speech first (vad): no package here carries such a model",
)


def make(settings: Settings) -> Whisper:
    """The engine as the configuration wants it."""
    return Whisper(settings.runtime.base_image)


class Whisper:
    """Turns sound into text with whisper.cpp: OpenAI's routes for transcriptions and translations."""

    name = FACTS.name
    facts = FACTS

    def __init__(self, base_image: str = "") -> None:
        self._base_image = base_image

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether there is a GGML file."""
        return bool(_models(files))

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``."""
        return _serves(metadata)

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings in canonical form; UsageError names an unknown one with its closest match."""
        return TABLE.canonical(settings)

    def defaults(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What holds where nobody says anything."""
        return TABLE.defaults

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        settings = TABLE.defaults | TABLE.canonical(request.settings)
        file = _chosen(request, settings["file"])
        if settings["vad"] and settings["vad"] not in {f.name for f in request.files}:
            raise UsageError(
                f"the model '{request.model}' has no file '{settings['vad']}' to find speech with",
                hint="Package a folder that holds the model and, from whisper.cpp, ggml-silero-….bin.",
            )
        needed = _estimate(request, settings, file)
        if request.free_memory and needed.total > request.free_memory:
            raise serving.too_large(
                request.model,
                {
                    "weights": needed.weights,
                    "caches": needed.kv_cache,
                    "work": needed.compute,
                    "program": needed.overhead,
                },
                request.free_memory,
                hint="Try --option parallel=1, a smaller or quantized model, or stop another model.",
                **needed.to_dict(),
            )
        return Plan(spec=self._spec(request, settings, file, needed), context=0, memory=needed.total)

    def _spec(
        self, request: PlanRequest, settings: Mapping[str, Any], file: ModelFile, needed: WhisperEstimate
    ) -> LaunchSpec:
        return LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=serving.command(_server(request, settings, file), "whisper"),
            model_dir=str(request.model_dir),
            entry=str(serving.PROGRAMS),
            environment=WHEELS,
            image=ImageRecipe(self.name, self._base_image, WHEELS.requirements, serving.program_files("whisper")),
            env=serving.ENV,
            limits=Limits(memory=needed.total * 5 // 4 + 512 * MIB),
            serves=_serves(request.metadata),
        )


def _server(request: PlanRequest, settings: Mapping[str, Any], file: ModelFile) -> dict[str, Any]:
    """What the server program is told (``programs.whisper.settings``)."""
    same = ("vad", "parallel", "queue", "language", "translate", "temperature", "fallback", "beam_size", "best_of")
    return {
        "name": request.model,
        "file": file.name,
        **{name: settings[name] for name in (*same, "suppress_non_speech", "flash_attention", "max_seconds")},
        "threads": settings["threads"] or max(1, request.cpus // settings["parallel"]),
        "piece": PIECE,
        "max_body": settings["max_body_mb"] * MIB,
    }


# --- the model --------------------------------------------------------------------------------------------------------


def _models(files: tuple[ModelFile, ...]) -> list[ModelFile]:
    return sorted((f for f in files if f.role == "weights" and f.format == "ggml"), key=lambda f: f.name)


def _chosen(request: PlanRequest, wanted: str) -> ModelFile:
    found = _models(request.files)
    chosen = next((f for f in found if f.name == wanted or not wanted), None)
    if chosen is None:
        raise UsageError(
            f"the model '{request.model}' has no file '{wanted}'", hint=f"It has: {', '.join(f.name for f in found)}."
        )
    return chosen


def _serves(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """A model that knows English only has nothing to translate."""
    shape: Mapping[str, Any] = metadata.get("whisper") or {}
    return ("transcriptions", "translations") if shape.get("multilingual", True) else ("transcriptions",)


def _estimate(request: PlanRequest, settings: Mapping[str, Any], file: ModelFile) -> WhisperEstimate:
    variants: Mapping[str, Any] = request.metadata.get("variants") or {}
    shape = {"whisper": variants.get(file.name) or request.metadata.get("whisper")}
    return estimate_whisper(
        shape,
        size=file.size,
        workers=settings["parallel"],
        decoders=max(settings["beam_size"], settings["best_of"] if settings["fallback"] else 1),
        seconds=settings["max_seconds"],
        body=settings["max_body_mb"] * MIB,
    )
