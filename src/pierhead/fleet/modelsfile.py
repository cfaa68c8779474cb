"""The shape of ``models.toml``, a user's settings of each model, and its reading; looks at no store and no engine."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import msgspec

from pierhead.config import Replicas, wanted
from pierhead.engines.common_settings import COMMON, checked
from pierhead.engines.setting_table import spelled
from pierhead.errors import ConfigError, UsageError

ADAPTERS = "adapters"
ALL = "*"  # the table of what holds for all models
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Keeping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How a model is kept and by which engine; None: not said. ``keep_alive`` in seconds, negative for ever."""

    engine: str | None = None
    runtime: Literal["auto", "process", "docker"] | None = None
    keep_alive: float | None = None
    pin: bool | None = None
    replicas: Replicas | None = None


KEEPING = Keeping.__struct_fields__


class ModelTable(msgspec.Struct, frozen=True, kw_only=True):
    """One table: how the model is kept, common settings of engines, and ``options`` in its engine's own words.

    ``adapters`` are LoRAs of the store that it is to have at hand, with their scales.
    """

    keeping: Keeping = Keeping()
    common: dict[str, Any] = {}
    options: dict[str, Any] = {}
    adapters: dict[str, float] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What the engine is given."""
        return {**self.common, **self.options}


class ModelsFile(msgspec.Struct, frozen=True):
    """All of ``models.toml``; ``path`` is what to call it."""

    models: dict[str, ModelTable] = {}
    path: str = "models.toml"

    def of(self, names: Iterable[str]) -> tuple[str, ModelTable] | None:
        """The table of a model that is called by any of ``names``, and by which."""
        for name in names:
            for spelling in (name, name.removesuffix(":latest"), f"{name}:latest"):
                if spelling in self.models:
                    return spelling, self.models[spelling]
        return None

    @property
    def everybody(self) -> ModelTable:
        """What holds for all models."""
        return self.models.get(ALL, ModelTable())


def read(text: str, path: str = "models.toml") -> ModelsFile:
    """The file's contents; ConfigError for what is not understood, with the place and the closest known word."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path} is no TOML: {exc}", hint="Correct it; until then the last good one holds.") from exc
    for section in raw:
        if section != "models":
            raise ConfigError(f"{path}: unknown table '{section}'", hint='Write [models."NAME"].')
    tables: Any = raw.get("models", {})
    if not isinstance(tables, dict):
        raise ConfigError(f"{path}: 'models' must be a table", hint='Write [models."NAME"].')
    made = {name: table(value, f"{path}: models.{name}") for name, value in cast("dict[str, Any]", tables).items()}
    return ModelsFile(made, path)


def table(raw: Any, at: str) -> ModelTable:
    """One table of the file; ``at`` says where it is."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{at} must be a table", hint="For example: context = 4096")
    keeping: dict[str, Any] = {}
    common: dict[str, Any] = {}
    tables: dict[str, Any] = {"options": {}, "adapters": {}}
    for name, value in cast("dict[str, Any]", raw).items():
        if name in tables:
            tables[name] = value
        elif name in KEEPING:
            keeping[name] = value
        elif name in COMMON:
            common[name] = _common(name, value, at)
        else:
            raise unknown(name, at)
    for name, value in tables.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{at}.{name} must be a table", hint='For example: options = { flash_attn = "on" }')
    adapters = {name: _scale(scale, f"{at}.adapters.{name}") for name, scale in tables["adapters"].items()}
    return ModelTable(keeping=kept(keeping, at), common=common, options=tables["options"], adapters=adapters)


def _scale(value: Any, at: str) -> float:
    """How strongly a LoRA counts."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise ConfigError(f"{at} is not a scale", hint="Write a number: 1 is as it was trained, 0.5 half of it.")
    return float(value)


def unknown(name: str, at: str) -> ConfigError:
    """The refusal of a word that no table has."""
    close = difflib.get_close_matches(spelled(name), (*KEEPING, *COMMON, "options", "adapters"), 1)
    hint = f"Did you mean '{close[0]}'?" if close else "An engine's own settings go into `options`."
    return ConfigError(f"{at}: unknown key '{name}'", hint=hint, data={"parameter": name})


def kept(raw: Mapping[str, Any], at: str) -> Keeping:
    """How a model is kept, from plain values; a time may be ``5m``."""
    plain = dict(raw)
    if isinstance(plain.get("keep_alive"), str):
        plain["keep_alive"] = seconds(plain["keep_alive"], at)
    try:
        found = msgspec.convert(plain, Keeping)
    except msgspec.ValidationError as exc:
        name = str(exc).rpartition("`$.")[2].rstrip("`")
        kind = next((f.type for f in msgspec.structs.fields(Keeping) if f.name == name), str)
        where = "" if at == name else f"{at}: "
        raise ConfigError(
            f"{where}bad value {plain.get(name)!r:.60} for '{name}'", hint=f"It must be {wanted(kind)}."
        ) from exc
    if found.keep_alive is not None and not abs(found.keep_alive) < 1e9:
        raise ConfigError(f"{at}: keep_alive is not a time", hint=_TIME)
    return found


_TIME = "Write 90s, 5m, 1h or -1 (for ever)."


def seconds(text: str, at: str) -> float:
    """``90s``, ``5m``, ``1h``, ``300`` or ``-1`` (for ever) in seconds."""
    unit = _UNITS.get(text[-1:])
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise ConfigError(f"{at}: '{text[:40]}' is not a time", hint=_TIME) from None


def _common(name: str, value: Any, at: str) -> Any:
    try:
        return checked(name, value)
    except UsageError as exc:
        raise ConfigError(f"{at}: {exc.message}", hint=exc.hint) from exc
