"""Shows the settings of one model with where each comes from, and makes ready what is to be written; holds nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from pierhead.daemon.modelbook import ModelBook
from pierhead.daemon.routes import PLUS, with_adapter
from pierhead.daemon.wire import AdapterInfo, ModelSettings, SettingsChange
from pierhead.engines.base import Describes, Engine, EngineFacts, Spells
from pierhead.engines.common_settings import COMMON, checked
from pierhead.engines.setting_table import spelled
from pierhead.errors import Conflict, NotFound, PierError, UsageError
from pierhead.fleet.info import ReplicaInfo
from pierhead.fleet.layers import ENGINE, Layers
from pierhead.fleet.merge import Layer, Setting, merge
from pierhead.fleet.modelsfile import ADAPTERS, ALL, KEEPING, kept
from pierhead.fleet.supervisor import Supervisor
from pierhead.gateway.link import Endpoint
from pierhead.store.layout import Store
from pierhead.store.model import ModelRecord

_SWITCH = {"true": True, "false": False}


class ModelDesk:
    """The settings of all models. ``changed`` is called after they were: what a model can do may be another now."""

    def __init__(self, book: ModelBook, store: Store, fleet: Supervisor, changed: Callable[[], None]) -> None:
        self._book = book
        self._store = store
        self._fleet = fleet
        self._changed = changed

    def refresh(self) -> None:
        """Read ``models.toml``. Blocking."""
        self._book.refresh()

    async def follow(self) -> None:
        """Read it again whenever it changes, until cancelled."""
        await self._book.follow(self._changed)

    async def show(self, name: str, *, everything: bool = False) -> ModelSettings:
        """What holds for a model, or (``*``) is said for all; ``everything``: what its engine does by itself, too."""
        if name == ALL:
            return _everybody(self._book)
        record = await asyncio.to_thread(self._store.get, name)
        asked, running = self._fleet.asked(record), self._fleet.in_use(record.digest)
        found = _shown(self._fleet.layers, self._book, record, asked, running=running, everything=everything)
        return replace(found, adapters=self._adapters(record), pending=self._fleet.pending(record))

    async def change(self, name: str, wanted: SettingsChange) -> ModelSettings:
        """Write what is wanted into ``models.toml``; UsageError for what the model's engine would not take."""
        record = None if name == ALL else await asyncio.to_thread(self._store.get, name)
        layers = self._fleet.layers
        engine = None if record is None else layers.engine(record, _engine(wanted))
        ready = dict(_typed(name, value, engine) for name, value in wanted.set.items())
        names = (ALL,) if record is None else (record.name, *record.names)
        adapters = wanted.set.get(ADAPTERS)
        if record is not None and isinstance(adapters, dict) and adapters.keys() - layers.adapters(record).keys():
            _takes_adapters(layers.engine(record, _engine(wanted)).facts, record)
        for adapter in adapters if isinstance(adapters, dict) else ():
            await asyncio.to_thread(self._check_adapter, record, adapter)
        before = self._keep_alive()
        unwanted = [self._as_written(record, names, name) for name in wanted.unset]
        await self._book.edit(names, ready, unwanted, lambda file: layers.reading(file).check(record))
        for running, seconds in self._keep_alive().items():
            if seconds != before.get(running):
                self._fleet.keep_loaded(running, seconds)  # which holds at once, unlike what an engine is started with
        if record is not None:
            await self._fleet.refit(record.digest)
        self._changed()
        return await self.show(name)

    def _keep_alive(self) -> dict[str, float]:
        """What the settings say of each model that runs, in seconds."""
        layers = self._fleet.layers
        return {r.life.model.name: layers.keeping(r.life.model)["keep_alive"].value for r in self._fleet.all()}

    def _as_written(self, record: ModelRecord | None, names: Iterable[str], name: str) -> str:
        """The word by which models.toml sets what an engine, and so the table of settings, calls ``name``."""
        found = self._book.current.of(names)
        layers = self._fleet.layers
        engines = layers.engines if record is None else (layers.engine(record),)
        for word, value in found[1].settings.items() if found is not None else ():
            for engine in engines:
                with contextlib.suppress(UsageError):
                    if list(engine.validate({word: value})) == [spelled(name)]:
                        return word
        return name

    def _check_adapter(self, record: ModelRecord | None, name: str) -> None:
        """NotFound or UsageError unless this is a LoRA of the store that fits the model."""
        adapter = self._store.get(name)
        if record is None or not any(f.role == "lora" for f in adapter.files):
            raise UsageError(f"'{name}' is no LoRA adapter", hint="`pier lora add MODEL FILE.gguf` brings one in.")
        facts = self._fleet.layers.engine(record).facts
        kept = str(adapter.metadata.get("format") or "")
        if kept and kept not in facts.formats:
            raise UsageError(
                f"{facts.title}, which serves '{record.name}', cannot use '{name}': it is in {kept}",
                hint=f"Bring one in {', '.join(facts.formats)}.",
            )
        ours, theirs = record.metadata.get("architecture"), adapter.metadata.get("architecture")
        if ours and theirs and ours != theirs:
            raise UsageError(
                f"'{name}' is a LoRA for {theirs}, '{record.name}' is {ours}", hint="Name one that fits the model."
            )

    # --- LoRA adapters --------------------------------------------------------------------------------------------

    def parted(self, name: str) -> tuple[str, str]:
        """A route's name as that of its model and that of the LoRA which is to count, "" for none. Blocking."""
        base, sign, adapter = name.rpartition(PLUS)
        if sign:
            with contextlib.suppress(PierError):
                if adapter in self._fleet.layers.adapters(self._store.get(base)):
                    return base, adapter
        return name, ""

    def base(self, name: str) -> str:
        """The model to start for a name that may end with one of its LoRAs; NotFound where it has none. Blocking."""
        base, adapter = self.parted(name)
        if adapter or PLUS not in name:
            return base
        model, _, adapter = name.rpartition(PLUS)
        raise NotFound(
            f"'{self._store.get(model).name}' has no adapter '{adapter}'",
            hint=f"`pier lora list {model}` shows those it has; `pier lora add {model} {adapter}` gives it one.",
        )

    def adapted(self, replica: ReplicaInfo, adapter: str) -> Endpoint:
        """Where a replica answers with a LoRA; Conflict when it was started before that was added."""
        record = self._store.get(replica.digest)
        found = with_adapter(replica, adapter, self._fleet.layers.adapters(record).get(adapter, 1.0))
        if found is None and (why := replica.refused.get(adapter)):
            raise Conflict(
                f"'{replica.model}' runs without '{adapter}': {why}",
                hint=f"Take it out: pier lora rm {replica.model} {adapter}",
            )
        if found is None:
            raise Conflict(
                f"'{replica.model}' runs without '{adapter}', which was added later",
                hint=f"`pier stop {replica.model}` lets the next request start it with all of its adapters.",
            )
        return found

    def _adapters(self, record: ModelRecord) -> tuple[AdapterInfo, ...]:
        running = [r for r in self._fleet.replicas() if r.digest == record.digest]
        loaded = {a.name for r in running for a in r.adapters}
        refused = {name: why for r in running for name, why in r.refused.items()}
        return tuple(
            AdapterInfo(name, scale, f"{record.name}{PLUS}{name}", name in loaded, refused.get(name, ""))
            for name, scale in self._fleet.layers.adapters(record).items()
        )


def _takes_adapters(facts: EngineFacts, record: ModelRecord) -> None:
    """UsageError where a model's engine could not start with an adapter of the store."""
    if facts.lora and not facts.lora_inside:
        return
    why = "takes adapters from the model's own folder only" if facts.lora else "cannot use LoRA adapters"
    raise UsageError(
        f"{facts.title}, which serves '{record.name}', {why}",
        hint="llama.cpp (GGUF) and vLLM (safetensors) can.",
    )


def _shown(
    layers: Layers, book: ModelBook, record: ModelRecord, asked: Mapping[str, Any], *, running: bool, everything: bool
) -> ModelSettings:
    """All that holds for a model; ``everything``: what its engine does where nobody says anything, too."""
    engine = layers.engine(record, asked)
    found = layers.settings(record, asked)
    if everything and isinstance(engine, Describes):
        usual = merge([Layer("default", engine.facts.title, engine.defaults(record.metadata))])
        found = {**usual, **{n: _above(s, usual.get(n)) for n, s in found.items()}}
    if isinstance(engine, Spells):
        found = {name: _spelled(engine, setting) for name, setting in found.items()}
    chosen = layers.chosen(record, asked) or Setting(name=ENGINE, value=engine.name, origin="default", where="Pierhead")
    names = sorted(found, key=lambda name: (list(COMMON).index(name) if name in COMMON else len(COMMON), name))
    return ModelSettings(
        model=record.name,
        engine=engine.name,
        file=str(book.file),
        error=book.error.to_dict() if book.error is not None else None,
        running=running,
        settings=(chosen, *layers.keeping(record).values(), *(found[name] for name in names)),
    )


def _above(setting: Setting, usual: Setting | None) -> Setting:
    """A value that stands over the engine's own."""
    return setting if usual is None else merge([*_layers(usual), *_layers(setting)])[setting.name]


def _spelled(engine: Spells, setting: Setting) -> Setting:
    """The same in the words that a person types."""
    over = tuple(replace(o, value=engine.spelled(setting.name, o.value)) for o in setting.over)
    return replace(setting, value=engine.spelled(setting.name, setting.value), over=over)


def _layers(setting: Setting) -> list[Layer]:
    under = [Layer(o.origin, o.where, {setting.name: o.value}) for o in reversed(setting.over)]
    return [*under, Layer(setting.origin, setting.where, {setting.name: setting.value})]


def _everybody(book: ModelBook) -> ModelSettings:
    """What models.toml says for all models."""
    table, where = book.current.everybody, f"{book.current.path} [all models]"
    said = {k: v for k in KEEPING if (v := getattr(table.keeping, k)) is not None}
    return ModelSettings(
        model=ALL,
        file=str(book.file),
        error=book.error.to_dict() if book.error is not None else None,
        settings=tuple(merge([Layer("models.toml", where, {**said, **table.settings})]).values()),
    )


def _engine(wanted: SettingsChange) -> dict[str, Any]:
    """The engine that is to serve from now on, where that is what changes."""
    return {ENGINE: wanted.set[ENGINE]} if wanted.set.get(ENGINE) else {}


def _typed(given: str, value: Any, engine: Engine | None) -> tuple[str, Any]:
    """A name and a value as they are written into the file: numbers and switches as such."""
    name = spelled(given)
    if name == ADAPTERS:
        return name, value
    if name in KEEPING:
        plain = _SWITCH.get(value.lower(), value) if name == "pin" and isinstance(value, str) else value
        plain = _number(plain) if name in ("replicas", "keep_alive") else plain
        kept({name: plain}, given)
        return name, plain
    if name in COMMON:
        return name, checked(name, value)
    if engine is None:
        return name, value
    found = engine.validate({given: value})
    if len(found) != 1:
        return name, value
    [(canonical, typed)] = found.items()
    if canonical in COMMON:
        return canonical, typed
    return name, value if isinstance(typed, str) else typed


def _number(value: Any) -> Any:
    try:
        return int(value) if isinstance(value, str) else value
    except ValueError:
        return value
