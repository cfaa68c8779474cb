"""The Python engine: turns somebody's own class and its settings into a launch plan; pure, runs none of its code."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from pierhead.config import Settings
from pierhead.engines import serving
from pierhead.engines.base import EngineFacts, Environment, ImageRecipe, LaunchSpec, Limits, Plan, PlanRequest
from pierhead.engines.python_settings import TABLE
from pierhead.errors import UsageError
from pierhead.formats.python_model import FORMAT, NAME, OPERATIONS, PythonModel, of_summary
from pierhead.store.model import ModelFile

MIB = 1 << 20
OPENAPI = "python-openapi"  # the gateway's word for its document
PROGRAM = 96 * MIB  # the server with nothing of the model's
# The server's own packages: as they were tried, and the bounds within which a model may want others.
SERVER = ("fastapi==0.165.0", "uvicorn==0.54.0", "uvloop==0.23.0", "httptools==0.9.0", "python-multipart==0.0.34")
BOUNDS = ("fastapi>=0.115,<1", "uvicorn>=0.30,<1", "uvloop>=0.20", "httptools>=0.6", "python-multipart>=0.0.9")
PYTHONS = tuple(f"3.{minor}" for minor in range(11, 15))
# What a library takes in memory when it is imported, in MiB; measured roughly, it only has to be of the right size.
_LIBRARIES = {
    "torch": 500,
    "tensorflow": 700,
    "jax": 400,
    "transformers": 200,
    "onnxruntime": 80,
    "scikit-learn": 150,
    "scipy": 80,
    "pandas": 100,
    "numpy": 40,
}
FACTS = EngineFacts(
    pictures="also",
    name="python",
    title="Python",
    formats=(FORMAT,),
    marks=(NAME,),
    serves=(*OPERATIONS.values(), OPENAPI),
    accelerators=("cpu", "cuda", "rocm"),
    common=("threads",),
    parallel=0,
    metrics={"running": "python_model_running", "waiting": "python_model_waiting"},
    untested="models that use a GPU",
)


def make(settings: Settings) -> Python:
    """The engine as the configuration wants it."""
    return Python(settings.runtime.base_image)


class Python:
    """Serves a class with ``load`` and ``predict`` (or ``chat``, ``embed`` …) that was packaged as a model."""

    name = FACTS.name
    facts = FACTS
    environment = Environment(SERVER)  # of models that need nothing themselves

    def __init__(self, base_image: str = "") -> None:
        self._base_image = base_image

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether the file is there that says which class it is."""
        return any(file.name == NAME and file.format == FORMAT for file in files)

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``."""
        found = _program(metadata)
        return found.serves if found is not None else ()

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings in canonical form; UsageError names an unknown one with its closest match."""
        return TABLE.canonical(settings)

    def defaults(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What holds where nobody but the class itself says anything."""
        program = _program(metadata)
        return TABLE.defaults | TABLE.canonical(program.settings if program else {})

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        program = _program(request.metadata)
        if program is None:
            raise UsageError(f"'{request.model}' does not say which class it is", hint="Package the model again.")
        settings = TABLE.defaults | TABLE.canonical(program.settings) | TABLE.canonical(request.settings)
        needed = settings["memory"] or estimate(program, request.files)
        if request.free_memory and needed > request.free_memory:
            hint = "Stop another model, or say what it needs: --option memory=500MiB."
            raise serving.too_large(request.model, {"as a guess": needed}, request.free_memory, hint=hint)
        return Plan(spec=self._spec(request, program, settings, needed), context=0, memory=needed)

    def _spec(self, request: PlanRequest, program: PythonModel, settings: Mapping[str, Any], needed: int) -> LaunchSpec:
        server = {
            "name": request.model,
            "module": program.module,
            "cls": program.cls,
            **{name: settings[name] for name in ("max_batch_size", "batch_delay_ms", "concurrency")},
        }
        pins = requirements(program)
        threads = str(settings["threads"] or max(1, request.cpus))
        python = _python(request.model, program.python, platform.python_version())
        inside = _python(request.model, program.python, f"{serving.python_of(self._base_image)}.99")
        return LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=serving.command(server, "python"),
            model_dir=str(request.model_dir),
            entry=str(serving.PROGRAMS),
            environment=Environment(pins, python),
            env={"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **serving.ENV, "PYTHONDONTWRITEBYTECODE": "1"},
            image=ImageRecipe(
                self.name, self._base_image, pins, serving.program_files("python"), dependencies=True, python=inside
            ),
            limits=Limits(memory=max(needed * 2, needed + 1024 * MIB)),
            serves=(*program.serves, OPENAPI),
        )


def requirements(program: PythonModel) -> tuple[str, ...]:
    """What is installed for a model: what it was locked to, else what its author wrote, and the server's own."""
    if program.locked:
        return (*program.locked, *BOUNDS)
    return (*program.requirements, *BOUNDS) if program.requirements else SERVER


def estimate(program: PythonModel, files: tuple[ModelFile, ...]) -> int:
    """Bytes that it may take: its libraries, and its weights once in memory with a fifth on top."""
    names = {re.split(r"[^a-z0-9-]", text.lower().replace("_", "-"), maxsplit=1)[0] for text in requirements(program)}
    libraries = sum(size for name, size in _LIBRARIES.items() if name in names) * MIB
    weights = sum(f.size for f in files if f.role in ("weights", "lora", "draft", "mmproj"))
    return PROGRAM + libraries + weights * 6 // 5


def _program(metadata: Mapping[str, Any]) -> PythonModel | None:
    try:
        return of_summary(metadata)
    except msgspec.ValidationError:
        return None


def _python(model: str, wanted: str, own: str) -> str:
    """The version of Python for what the author says; "" where ``own`` will do."""
    try:
        asked = SpecifierSet(wanted)
    except InvalidSpecifier as exc:
        raise UsageError(
            f"'{model}' asks for Python '{wanted[:40]}'", hint="Write requires-python as '>=3.11'."
        ) from exc
    if own in asked:
        return ""
    for version in PYTHONS:
        if any(f"{version}.{micro}" in asked for micro in (0, 99)):
            return version
    raise UsageError(f"'{model}' asks for Python {wanted}; the server runs on {PYTHONS[0]} to {PYTHONS[-1]}")
