"""Where a model's settings come from, and which of them hold: the one place that knows the order; starts nothing.

From the weakest to the strongest: ``[engine]`` of the configuration, ``[engine.defaults.ENGINE]``, what the model was
packaged with, ``models.toml`` for all models and for this one, and what is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pierhead.config import EngineSettings, FleetSettings, Loaded, Settings
from pierhead.engines.base import Engine
from pierhead.engines.registry import choose, find, suits
from pierhead.errors import ConfigError, UsageError
from pierhead.fleet.merge import Layer, Setting, merge
from pierhead.fleet.modelsfile import KEEPING, ModelsFile, ModelTable
from pierhead.store.model import ModelRecord

_NOTHING: Mapping[str, Any] = {}
ENGINE = "engine"


class Layers:
    """All layers but the one that is asked for; ``file`` gives the ``models.toml`` in force."""

    def __init__(
        self,
        engines: Sequence[Engine],
        loaded: Loaded,
        file: Callable[[], ModelsFile] = ModelsFile,
    ) -> None:
        self._engines = engines
        self._loaded = loaded
        self._engine: EngineSettings = loaded.settings.engine
        self._fleet: FleetSettings = loaded.settings.fleet
        self._origins = loaded.origins
        self._file = file
        for name in self._engine.defaults:
            _check_engine(name, engines)

    @property
    def engines(self) -> Sequence[Engine]:
        """All there are, in the order in which they are asked whether they serve a model."""
        return self._engines

    def reading(self, file: ModelsFile) -> Layers:
        """The same with another ``models.toml``."""
        return Layers(self._engines, self._loaded, lambda: file)

    def check(self, record: ModelRecord | None) -> None:
        """UsageError for what the engine of this model would not take, or (None) no engine for all models."""
        if record is not None:
            self.settings(record)
            return
        file = self._file()
        table, where = file.everybody, f"{file.path} [all models]"
        if table.keeping.engine is not None:
            find(self._engines, table.keeping.engine)
        for name, value in table.options.items():
            self._known(self._engines[0], {name: value}, where)

    # --- which engine ---------------------------------------------------------------------------------------------

    def engine(self, record: ModelRecord, asked: Mapping[str, Any] = _NOTHING) -> Engine:
        """The engine that serves this model; UsageError when there is none."""
        setting = self.chosen(record, asked)
        name = str(setting.value) if setting else ""
        return choose(self._engines, record.laid_out, name, record.name, record.metadata)

    def chosen(self, record: ModelRecord, asked: Mapping[str, Any] = _NOTHING) -> Setting | None:
        """Who says which engine it is; None: nobody, so it is the first that accepts the model."""
        layers = [Layer("packaged", "the model", _picked(record.packaged.options.get(ENGINE)))]
        for where, table, everybody in self._tables(record):
            name = table.keeping.engine
            if not everybody or self._fits(name, record):
                layers.append(Layer("models.toml", where, _picked(name)))
        layers.append(Layer("asked", "asked for", _picked(asked.get(ENGINE))))
        return merge(layers).get(ENGINE)

    def adapters(self, record: ModelRecord) -> dict[str, float]:
        """The LoRAs that a model is to have at hand, by their names in the store, with their scales."""
        own = self._file().of((record.plain, *record.names))
        return dict(own[1].adapters) if own is not None else {}

    def _fits(self, name: str | None, record: ModelRecord) -> bool:
        """Whether an engine for all models is one for this one."""
        return any(e.name == name and e.accepts(record.laid_out) and suits(e, record.metadata) for e in self._engines)

    # --- what it is given -----------------------------------------------------------------------------------------

    def settings(self, record: ModelRecord, asked: Mapping[str, Any] = _NOTHING) -> dict[str, Setting]:
        """The engine's settings under its own names; UsageError, with the place, for one that it does not take."""
        engine = self.engine(record, asked)
        layers = [*self._configured(engine), *self._packaged(engine, record)]
        for where, table, everybody in self._tables(record):
            take = self._known if everybody else _strict
            layers.append(Layer("models.toml", where, take(engine, table.settings, where)))
        layers.append(Layer("asked", "asked for", engine.validate(of_engine(asked))))
        return merge(layers)

    def _configured(self, engine: Engine) -> list[Layer]:
        ours, found = self._engine, list[Layer]()
        for name in ("context", "parallel", "threads"):
            value = getattr(ours, name)
            if value and name in engine.facts.common:
                where = self._origins.get(f"engine.{name}")
                found.append(
                    Layer("config" if where else "default", where or "Pierhead", engine.validate({name: value}))
                )
        where = f"{self._origins.get('engine.options', 'config.toml')} [engine] options"
        found.append(Layer("config", where, self._known(engine, ours.options, where)))
        where = f"{self._origins.get('engine.defaults', 'config.toml')} [engine.defaults.{engine.name}]"
        found.append(Layer("engine config", where, _strict(engine, ours.defaults.get(engine.name, {}), where)))
        return found

    @staticmethod
    def _packaged(engine: Engine, record: ModelRecord) -> list[Layer]:
        packaged = record.packaged
        values = {**({"context": packaged.context} if packaged.context else {}), **of_engine(packaged.options)}
        return [Layer("packaged", "the model", engine.validate(values))]

    def _tables(self, record: ModelRecord) -> list[tuple[str, ModelTable, bool]]:
        file = self._file()
        found = [(f"{file.path} [all models]", file.everybody, True)]
        if (own := file.of((record.plain, *record.names))) is not None:
            found.append((f"{file.path} [{own[0]}]", own[1], False))
        return found

    def _known(self, engine: Engine, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Those settings for several engines that this one knows; UsageError for one that none of them knows."""
        found: dict[str, Any] = {}
        for name, value in given.items():
            try:
                found |= engine.validate({name: value})
            except UsageError as exc:
                others = (e for e in self._engines if e is not engine)
                if not is_unknown(exc):
                    raise _at(exc, where) from exc
                if not any(_takes(e, name, value) for e in others):
                    raise _nobodys(name, value, self._engines, where) from exc
        return found

    # --- how it is kept -------------------------------------------------------------------------------------------

    def keeping(self, record: ModelRecord) -> dict[str, Setting]:
        """``runtime``, ``keep_alive``, ``pin`` and ``replicas`` of a model, where nothing is asked for."""
        fleet, origins = self._fleet, self._origins
        layers = [Layer("default", "Pierhead", {"runtime": None, "pin": False})]
        for name in ("keep_alive", "replicas"):
            where = origins.get(f"fleet.{name}")
            layers.append(Layer("config" if where else "default", where or "Pierhead", {name: getattr(fleet, name)}))
        for name in (record.plain, *record.names):
            spelling = name if name in fleet.models else name.removesuffix(":latest")
            if spelling in fleet.models:
                where = f"{origins.get('fleet.models', 'config.toml')} [fleet.models.{spelling}]"
                layers.append(Layer("config", where, {"replicas": fleet.models[spelling].replicas}))
                break
        for where, table, _ in self._tables(record):
            said = {k: getattr(table.keeping, k) for k in KEEPING if k != ENGINE}
            layers.append(Layer("models.toml", where, {k: v for k, v in said.items() if v is not None}))
        return merge(layers)


def of_engine(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the engine itself understands."""
    return {name: value for name, value in settings.items() if name != ENGINE}


def is_unknown(exc: UsageError) -> bool:
    """Whether an engine refused a setting because it has none of that name."""
    return "parameter" in exc.data


def plain(settings: Settings) -> Loaded:
    """Settings of which nobody knows the origins."""
    return Loaded(settings, {})


def _picked(name: Any) -> dict[str, Any]:
    return {ENGINE: name} if name else {}


def _strict(engine: Engine, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return engine.validate(given)
    except UsageError as exc:
        raise _at(exc, where) from exc


def _at(exc: UsageError, where: str) -> UsageError:
    return type(exc)(f"{where}: {exc.message}", hint=exc.hint, data=exc.data)


def _takes(engine: Engine, name: str, value: Any) -> bool:
    try:
        engine.validate({name: value})
    except UsageError as exc:
        return not is_unknown(exc)
    return True


def _nobodys(name: str, value: Any, engines: Sequence[Engine], where: str) -> UsageError:
    """The refusal of a setting that no engine has, with the closest of any."""
    close: list[str] = []
    for engine in engines:
        try:
            engine.validate({name: value})
        except UsageError as exc:
            close += [exc.data["closest"]] if exc.data.get("closest") else []
    hint = f"Did you mean '{close[0]}'?" if close else "`pier settings MODEL --all` lists what a model's engine has."
    return UsageError(f"{where}: no engine has a setting '{name}'", hint=hint, data={"parameter": name})


def _check_engine(name: str, engines: Sequence[Engine]) -> None:
    every = [engine.name for engine in engines]
    if name not in every:
        close = difflib.get_close_matches(name, every, 1)
        raise ConfigError(
            f"[engine.defaults.{name}]: there is no engine '{name}'",
            hint=f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(every)}.",
        )
