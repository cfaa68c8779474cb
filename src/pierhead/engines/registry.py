"""Which engines there are and which of them serves a model; pure but for the import of plugins."""

from __future__ import annotations

import difflib
import posixpath
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pierhead import plugins
from pierhead.config import Settings
from pierhead.engines.base import Engine
from pierhead.engines.command import Command
from pierhead.errors import ConfigError, UsageError
from pierhead.formats.pictures import TYPE
from pierhead.store.model import ModelFile

_NOTHING: Mapping[str, Any] = MappingProxyType({})
GROUP = "pierhead.engines"
# Name to a function of the settings that makes it; where several serve a format, the first one is taken.
BUILTIN: dict[str, str] = {
    "python": "pierhead.engines.python:make",
    "llamacpp": "pierhead.engines.llamacpp:make",
    "stable-diffusion": "pierhead.engines.diffusion:make",
    "onnx": "pierhead.engines.onnx:make",
    "triton": "pierhead.engines.triton:make",
    "openvino": "pierhead.engines.openvino:make",
    "whisper": "pierhead.engines.whisper:make",
    "vllm": "pierhead.engines.vllm:make",
    "sglang": "pierhead.engines.sglang:make",
    "tensorrtllm": "pierhead.engines.tensorrtllm:make",
}


def engines(settings: Settings) -> tuple[Engine, ...]:
    """Every engine of this installation; ConfigError when a plugin cannot be loaded."""
    made: list[Engine] = [plugins.load(name, place)(settings) for name, place in plugins.names(GROUP, BUILTIN).items()]
    for name, template in settings.engines.items():
        if any(engine.name == name for engine in made):
            raise ConfigError(f"[engines.{name}] has the name of an engine that is there", hint="Call it otherwise.")
        made.append(Command(name, template, settings.runtime.base_image))
    return tuple(made)


def choose(
    known: Sequence[Engine],
    files: tuple[ModelFile, ...],
    name: str = "",
    model: str = "",
    metadata: Mapping[str, Any] = _NOTHING,
) -> Engine:
    """The engine called ``name``, or the first that serves these files; UsageError when there is none.

    ``metadata`` is the summary of the weights: files of one format may be of models that write or that paint.
    """
    if name:
        found = find(known, name)
        if metadata and found.accepts(files) and not suits(found, metadata):
            raise UsageError(
                f"the engine {name} cannot serve '{model}': {_made_for(metadata)}",
                hint=f"Leave out the engine; `pier inspect {model}` shows what it is.",
                data={"engine": name, "type": metadata.get("type")},
            )
        if not found.accepts(files):
            raise UsageError(
                f"the engine {name} cannot serve '{model}': it reads {', '.join(found.facts.formats)}",
                hint=f"{_what(files).capitalize()}. `pier inspect {model}` shows the files.",
                data={"engine": name, "formats": _formats(files)},
            )
        return found
    names = {posixpath.basename(f.name) for f in files}
    for engine in sorted(known, key=lambda e: names.isdisjoint(e.facts.marks)):  # those it was made for come first
        if engine.accepts(files) and (not metadata or suits(engine, metadata)):
            return engine
    reads = "; ".join(f"{e.facts.title} serves {', '.join(e.facts.formats)}" for e in known)
    raise UsageError(
        f"no engine can serve '{model}' yet: {_what(files)}",
        hint=f"{reads}. `pier inspect {model}` shows the files.",
        data={"formats": _formats(files)},
    )


def suits(engine: Engine, metadata: Mapping[str, Any]) -> bool:
    """Whether an engine is for this kind of model: one that paints (``diffusion``), or any other."""
    paints = metadata.get("type") == TYPE
    return engine.facts.pictures in (("only", "also") if paints else ("no", "also"))


def _made_for(metadata: Mapping[str, Any]) -> str:
    paints = metadata.get("type") == TYPE
    return f"it makes pictures ({metadata.get('architecture')})" if paints else "it does not make pictures"


def find(known: Sequence[Engine], name: str) -> Engine:
    """The engine called ``name``; UsageError with the closest when there is none."""
    for engine in known:
        if engine.name == name:
            return engine
    every = [engine.name for engine in known]
    close = difflib.get_close_matches(name, every, 1)
    raise UsageError(
        f"there is no engine '{name}'",
        hint=f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(every)}.",
        data={"engine": name},
    )


def _formats(files: tuple[ModelFile, ...]) -> list[str]:
    return sorted({f.format for f in files if f.role == "weights" and f.format not in ("", "data")})


def _what(files: tuple[ModelFile, ...]) -> str:
    formats = _formats(files)
    if not formats and any(f.role == "lora" for f in files):
        return "it is a LoRA adapter, which adds to a model (`pier lora add MODEL NAME`)"
    return f"its weights are in {', '.join(formats)}" if formats else "it has no weights of a known format"
