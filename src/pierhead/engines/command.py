"""Any command as an engine: a template of the settings file becomes launch plans; no code of its own, no shell."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pierhead.config import EngineTemplate
from pierhead.engines import bridge, serving
from pierhead.engines.base import (
    EngineFacts,
    Environment,
    ImageRecipe,
    LaunchSpec,
    Limits,
    Mount,
    Plan,
    PlanRequest,
    Readiness,
)
from pierhead.engines.setting_table import byte_count, spelled, switch, unknown
from pierhead.errors import ConfigError, OutOfMemory, UsageError
from pierhead.store.model import ModelFile

MIB = 1 << 20
PROGRAM = 512 * MIB  # what a program that nobody has measured is taken to need beside its weights
SERVES = (
    "chat",
    "completions",
    "embeddings",
    "rerank",
    "classify",
    "score",
    "predict",
    "infer",
    "transcriptions",
    "translations",
    "speech",
    "images",
)
COMMON = ("context", "parallel", "threads")
PLACES = ("PYTHON", "MODEL_DIR", "SOCKET", "PORT", "METRICS_PORT", "WEIGHTS", "NAME")
_PLACE = re.compile(r"\$\(([^)]*)\)")
_SETTING = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
_SYSTEM = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib64/")


class Command:
    """An engine made of ``[engines.NAME]``; ConfigError says what of the template cannot be."""

    def __init__(self, name: str, template: EngineTemplate, base_image: str = "") -> None:
        check(name, template)
        self.name = name
        self._template = template
        self._base_image = base_image
        self.program = _program(template)
        self._mounts = _mounts(name, template, self.program)
        self._listens = any("$(SOCKET)" in word for word in template.command)
        self.environment = Environment(template.requirements, template.python) if template.requirements else None
        self.facts = EngineFacts(
            pictures="also",
            name=name,
            title=template.title or name,
            formats=template.formats,
            serves=template.serves,
            common=tuple(one for one in COMMON if one in template.settings),
            parallel=int(template.settings.get("parallel", 0)),
        )

    @property
    def missing(self) -> str:
        """The program, where it is to be one of this machine's and is not here."""
        template = self._template
        own = not (template.image or template.requirements or self.program.startswith("$("))
        return self.program if own and shutil.which(self.program) is None else ""

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        """Whether there are weights of one of its formats."""
        return any(file.role == "weights" and file.format in self._template.formats for file in files)

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """See ``Engine.capabilities``."""
        known = set(SERVES) - {"score", "translations"}
        return tuple(name for name in self._template.serves if name in known)

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the types of the template's defaults; UsageError names an unknown one with its closest match."""
        done: dict[str, Any] = {}
        known = self._template.settings
        for given, value in settings.items():
            name = spelled(given)
            if name not in known:
                raise unknown(f"the engine {self.name}", given, known)
            try:
                done[name] = _typed(known[name], value)
            except (TypeError, ValueError, OverflowError) as exc:
                raise UsageError(
                    f"bad value {value!r:.60} for the setting '{given}' of the engine {self.name}",
                    hint=f"It must be like its default, {known[name]!r}.",
                ) from exc
        return done

    def plan(self, request: PlanRequest) -> Plan:
        """The launch plan; see ``Engine.plan``."""
        settings = {**self._template.settings, **self.validate(request.settings)}
        weights = sum(f.size for f in request.files if f.role in ("weights", "lora", "draft", "mmproj"))
        template = self._template
        needed = int(byte_count(template.memory)) if template.memory else weights * 5 // 4 + PROGRAM
        if request.free_memory and needed > request.free_memory:
            raise OutOfMemory(
                f"'{request.model}' is taken to need {needed / MIB:,.0f} MiB with {self.name}; "
                f"{request.free_memory / MIB:,.0f} MiB are free",
                hint=f"Stop another model, or say what it needs: memory in [engines.{self.name}].",
                data={"needed": needed, "free": request.free_memory},
            )
        command = (self.program, *template.command[1:])
        words = [_filled(word, request, settings, template.formats) for word in command]
        spec = LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine=self.name,
            argv=self._argv(words),
            model_dir=str(request.model_dir),
            entry=str(bridge.ENTRY),
            environment=self.environment,
            env=serving.ENV | {k: _filled(v, request, settings, template.formats) for k, v in template.env.items()},
            mounts=(*self._mounts, *self._bridge()),
            image=self._recipe(),
            image_name=template.image,
            limits=Limits(memory=needed * 3 // 2 + PROGRAM),
            readiness=Readiness(template.health, template.start_timeout),
            serves=template.serves,
            called=template.called,
        )
        return Plan(spec=spec, context=int(settings.get("context", 0)), memory=needed)

    def _argv(self, words: list[str]) -> tuple[str, ...]:
        direct = self._listens
        if self._template.image:
            if direct:
                return tuple(words)
            return bridge.beside(*words, health=self._template.health)
        joined = bridge.watched if direct else bridge.bridged
        return joined(*words, health=self._template.health)

    def _bridge(self) -> tuple[Mount, ...]:
        """The bridge itself, which an image of somebody else's does not have."""
        beside = self._template.image and not self._listens
        return (Mount(str(bridge.ENTRY), bridge.BESIDE),) if beside else ()

    def _recipe(self) -> ImageRecipe | None:
        """The image of a program that comes as packages; a program of this machine is in no image."""
        wheels, version = self._template.requirements, self._template.python
        if self._template.image or not (wheels or self.program == "$(PYTHON)"):
            return None
        files = (bridge.recipe_file(),)
        return ImageRecipe(self.name, self._base_image, wheels, files, dependencies=bool(wheels), python=version)


def check(name: str, template: EngineTemplate) -> None:
    """ConfigError for a template that could never work, with what to write instead."""
    where = f"[engines.{name}]"
    if not template.formats or not template.command or not template.serves:
        raise ConfigError(f"{where} needs formats, serves and command", hint="None of them may be empty.")
    for word in template.serves:
        _known(word, SERVES, f"{where} serves", "operation")
    _check_settings(where, template)
    _check_places(where, template)
    if not template.health.startswith("/") or any(ord(c) <= 32 for c in template.health):
        raise ConfigError(f"{where}: health is no path", hint='Write health = "/health".')
    if template.image and template.requirements:
        raise ConfigError(f"{where} has an image and requirements", hint="Keep one of them.")
    try:
        byte_count(template.memory or 0)
    except ValueError as exc:
        raise ConfigError(f"{where}: memory '{template.memory[:40]}'", hint='Write memory = "2GiB".') from exc


def _check_settings(where: str, template: EngineTemplate) -> None:
    for setting, default in template.settings.items():
        if not _NAME.fullmatch(setting):
            raise ConfigError(f"{where} has a setting '{setting[:40]}'", hint="Names are like max_batch.")
        if setting in COMMON and (isinstance(default, bool) or not isinstance(default, int)):
            raise ConfigError(f"{where}: the setting {setting} is a number", hint=f"Write {setting} = 1.")


def _check_places(where: str, template: EngineTemplate) -> None:
    for text in (*template.command, *template.env.values()):
        for found in _PLACE.finditer(text):
            _known(found[1], PLACES, f"{where} command: $({found[1][:40]})", "place")
        for found in _SETTING.finditer(text):
            if found[1] is not None:
                _known(found[1], tuple(template.settings), f"{where} command: {{{found[1][:40]}}}", "setting")
    listens = [place for place in ("$(SOCKET)", "$(PORT)") if any(place in word for word in template.command)]
    if len(listens) != 1:
        raise ConfigError(
            f"{where} command says {'both' if listens else 'neither'} $(PORT) {'and' if listens else 'nor'} $(SOCKET)",
            hint='Tell it where to listen, as in "--port", "$(PORT)".',
        )


def _known(word: str, known: tuple[str, ...], where: str, what: str) -> None:
    if word in known:
        return
    close = difflib.get_close_matches(word, known, 1, 0.5)
    hint = f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(known) or 'none'}."
    raise ConfigError(f"{where}: there is no {what} '{word[:40]}'", hint=hint)


def _typed(default: Any, value: Any) -> Any:
    if isinstance(default, bool):
        return switch(value)
    if isinstance(value, bool):
        raise ValueError
    if isinstance(default, int):
        if float(value) != int(float(value)):
            raise ValueError
        return int(float(value))
    if isinstance(default, float):
        return float(value)
    text = str(value)
    if not text.isprintable() or len(text) > 1024 or text.startswith("-"):  # it must not become an option
        raise ValueError
    return text


def _filled(word: str, request: PlanRequest, settings: Mapping[str, Any], formats: tuple[str, ...]) -> str:
    """One word of the command: settings, the weights and the model's name put in, and never read as places."""

    def setting(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        value = settings[found[1]]
        text = ("true" if value else "false") if isinstance(value, bool) else str(value)
        return text.replace("$(", "$$(")

    weights = min(f.name for f in request.files if f.role == "weights" and f.format in formats)
    texts = {"WEIGHTS": weights, "NAME": request.model.lstrip("-")}
    parts = re.split(r"(\$\((?:WEIGHTS|NAME)\))", word)
    for at, part in enumerate(parts):
        own = texts.get(part[2:-1]) if part.startswith("$(") else None
        if own is None:
            parts[at] = _SETTING.sub(setting, part)
        else:
            parts[at] = own.replace("$(", "$$(") if at and parts[at - 1] else _first(own)
    return "".join(parts)


def _first(text: str) -> str:
    """A file's name as a word of its own is no option."""
    return ("./" + text if text.startswith("-") else text).replace("$(", "$$(")


def _mounts(name: str, template: EngineTemplate, program: str) -> tuple[Mount, ...]:
    """Folders that the template names, and the program itself where the sandbox does not have it."""
    found: list[str] = []
    for folder in template.mounts:
        if not folder.startswith("/") or Path(folder).resolve() == Path("/"):
            raise ConfigError(f"[engines.{name}] mounts '{folder[:80]}'", hint="Name folders by their whole path.")
        found.append(folder)
    if program.startswith("/"):
        for path in dict.fromkeys((program, os.path.realpath(program))):
            if not path.startswith(_SYSTEM) and not any(path.startswith(f.rstrip("/") + "/") for f in found):
                found.append(path)
    return tuple(Mount(folder, folder) for folder in found)


def _program(template: EngineTemplate) -> str:
    """The program by its whole path where it is one of this machine's; else as it is written."""
    program = template.command[0] if template.command else ""
    if template.image or template.requirements or program.startswith("$("):
        return program
    return shutil.which(program) or program
