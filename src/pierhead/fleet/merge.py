"""Layers of settings become one set, field by field, that remembers where each value comes from; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

Origin = Literal["default", "config", "engine config", "packaged", "models.toml", "asked"]


class Layer(NamedTuple):
    """Values that were set at one place; ``where`` names it for people, such as a file with its table."""

    origin: Origin
    where: str
    values: Mapping[str, Any]


class Over(msgspec.Struct, frozen=True):
    """A value that does not count, because a later layer has another."""

    value: Any
    origin: Origin
    where: str


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A value that holds, where it comes from, and what it stands over, the nearest first."""

    name: str
    value: Any
    origin: Origin
    where: str
    over: tuple[Over, ...] = ()


def merge(layers: Iterable[Layer]) -> dict[str, Setting]:
    """All settings by name; each from the last layer that has it."""
    found: dict[str, Setting] = {}
    for layer in layers:
        for name, value in layer.values.items():
            below = found.get(name)
            over = () if below is None else (Over(below.value, below.origin, below.where), *below.over)
            found[name] = Setting(name=name, value=value, origin=layer.origin, where=layer.where, over=over)
    return found


def values(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The values alone."""
    return {name: setting.value for name, setting in settings.items()}
