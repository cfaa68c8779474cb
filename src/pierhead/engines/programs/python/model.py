"""Somebody's class as the server sees it: imported, made, loaded, and what each of its methods takes and gives."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .calls import Calls, streams

METHODS = ("predict", "infer", "chat", "complete", "embed", "classify", "rerank", "transcribe")


class Unusable(Exception):
    """A class that cannot be served as it is: one sentence for its author."""


@dataclass(frozen=True)
class Settings:
    """What the engine's plan says."""

    name: str
    module: str
    cls: str
    max_batch_size: int = 1
    batch_delay_ms: float = 0.0
    concurrency: int = 1


@dataclass(frozen=True)
class Method:
    """One method: its arguments but ``self``, with their types as they mean (and not as they are written)."""

    name: str
    call: Callable[..., Any]
    arguments: dict[str, inspect.Parameter]
    types: dict[str, Any]
    streams: bool

    @property
    def open(self) -> bool:
        """Whether it takes any further arguments by name."""
        return any(p.kind is p.VAR_KEYWORD for p in self.arguments.values())

    def takes(self, given: dict[str, Any]) -> dict[str, Any]:
        """Those of the arguments on offer that it has a place for."""
        return dict(given) if self.open else {k: v for k, v in given.items() if k in self.arguments}


@dataclass(frozen=True)
class Model:
    """A loaded model: its methods by name."""

    settings: Settings
    folder: str
    about: str
    methods: dict[str, Method] = field(default_factory=dict[str, Method])


async def bring(settings: Settings, folder: str, calls: Calls) -> Model:
    """Import the class, make it and load it; what it raises is its own."""
    cls = await calls.call(find, settings, folder)
    loaded = await calls.call(cls)
    load = getattr(loaded, "load", None)
    if load is not None:
        wants = bool(arguments_of(load))
        await calls.call(load, *((folder,) if wants else ()))
    methods = {name: method(loaded, name) for name in METHODS if callable(getattr(loaded, name, None))}
    if not methods:
        raise Unusable(f"the class {settings.cls} has none of the methods {', '.join(METHODS)}")
    return Model(settings, folder, inspect.getdoc(cls) or "", methods)


def find(settings: Settings, folder: str) -> type:
    """The class in the model's folder, whose modules come first."""
    sys.path.insert(0, folder)
    source = os.path.join(folder, "src")
    if os.path.isdir(source):
        sys.path.insert(1, source)
    sys.dont_write_bytecode = True
    module = importlib.import_module(settings.module)
    found = getattr(module, settings.cls, None)
    if not isinstance(found, type):
        raise Unusable(f"{settings.module} has no class {settings.cls}")
    return found


def method(owner: Any, name: str) -> Method:
    """What is known of a method from its signature."""
    call = getattr(owner, name)
    return Method(name, call, arguments_of(call), types_of(call), streams(call))


def arguments_of(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Its arguments, without ``self``."""
    return dict(inspect.signature(call).parameters)


def types_of(call: Callable[..., Any]) -> dict[str, Any]:
    """The types of its arguments and of its result (``return``); what is not said is missing."""
    try:
        return typing.get_type_hints(call, include_extras=True)
    except NameError as exc:
        raise Unusable(f"a type of {getattr(call, '__qualname__', call)} is not known: {exc}") from exc
