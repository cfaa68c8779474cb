"""Which settings hold for a model, over all the places that may say something, and what each engine is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pierhead.config import EngineSettings, FleetSettings, Loaded, ModelFleet, Settings
from pierhead.engines.base import EngineFacts, Plan, PlanRequest
from pierhead.errors import ConfigError, UsageError
from pierhead.fleet.layers import Layers
from pierhead.fleet.modelsfile import ModelsFile, read
from pierhead.store.model import ModelFile, ModelRecord, Packaged


class Toy:
    """An engine with a few settings, for files of its own format."""

    def __init__(self, name: str, *own: str) -> None:
        self.name = name
        self.own = {"context", "parallel", "threads", *own}
        self.facts = EngineFacts(name=name, title=name.title(), formats=(name,), serves=("chat",))

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        return any(self.name in f.format for f in files)

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        return ("chat",)

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in settings.items():
            if name not in self.own:
                raise UsageError(f"{self.name} has no '{name}'", hint="Did you mean?", data={"parameter": name})
            if value == "bad":
                raise UsageError(f"bad value for '{name}'", hint="It must be good.")
        return dict(settings)

    def plan(self, request: PlanRequest) -> Plan:
        raise NotImplementedError


ENGINES = (Toy("one", "flash", "cache"), Toy("two", "batch"))


def record(form: str = "one", **packaged: Any) -> ModelRecord:
    return ModelRecord(
        name="m:latest",
        names=("m:latest", "other:1"),
        digest="sha256:0",
        size=1,
        created="2026-01-01T00:00:00Z",
        files=(ModelFile("w", 1, "weights", format=form),),
        metadata={},
        packaged=Packaged(**packaged),
    )


def layers(text: str = "", fleet: FleetSettings | None = None, **engine: Any) -> Layers:
    origins = {f"engine.{name}": "config.toml" for name in engine}
    settings = Settings(engine=EngineSettings(**engine), fleet=fleet or FleetSettings())
    file = read(text) if text else ModelsFile()
    return Layers(ENGINES, Loaded(settings, origins), lambda: file)


def test_the_nearest_place_wins_field_by_field() -> None:
    text = "[models.'*']\nparallel = 3\nthreads = 3\n[models.m]\nthreads = 4\noptions.cache = 4\n"
    made = layers(text, context=1, parallel=1, options={"flash": 1}, defaults={"one": {"cache": 2, "context": 2}})
    found = made.settings(record(context=8, options={"parallel": 2}), {"flash": 5})
    assert {name: (s.value, s.origin) for name, s in found.items()} == {
        "context": (8, "packaged"),
        "parallel": (3, "models.toml"),
        "threads": (4, "models.toml"),
        "flash": (5, "asked"),
        "cache": (4, "models.toml"),
    }
    assert [(o.value, o.origin) for o in found["context"].over] == [(2, "engine config"), (1, "config")]
    assert found["threads"].where == "models.toml [m]"
    assert [o.where for o in found["threads"].over] == ["models.toml [all models]"]


def test_options_for_all_reach_only_engines_that_know_them() -> None:
    made = layers("[models.'*']\noptions = { batch = 7, cache = 7 }\n", options={"flash": 1, "batch": 1})
    one = made.settings(record("one"))
    two = made.settings(record("two"))
    assert {name: s.value for name, s in one.items()} == {"flash": 1, "cache": 7}
    assert {name: s.value for name, s in two.items()} == {"batch": 7}


@pytest.mark.parametrize(
    ("text", "config", "place"),
    [
        ("[models.m]\noptions.flahs = 1\n", {}, r"models.toml \[m\]: one has no 'flahs'"),
        ("[models.m]\noptions.batch = 1\n", {}, r"models.toml \[m\]: one has no 'batch'"),
        ("[models.m]\noptions.flash = 'bad'\n", {}, r"models.toml \[m\]: bad value"),
        ("[models.'*']\noptions.flahs = 1\n", {}, r"\[all models\]: no engine has a setting 'flahs'"),
        ("", {"options": {"flahs": 1}}, r"\[engine\] options: no engine has a setting 'flahs'"),
        ("", {"options": {"flash": "bad"}}, r"\[engine\] options: bad value"),
        ("", {"defaults": {"one": {"batch": 1}}}, r"\[engine.defaults.one\]: one has no 'batch'"),
    ],
)
def test_what_the_engine_does_not_take_is_refused_with_its_place(text: str, config: Any, place: str) -> None:
    with pytest.raises(UsageError, match=place) as refused:
        layers(text, **config).settings(record())
    assert refused.value.hint


def test_defaults_of_an_engine_that_is_not_there_are_refused_with_the_closest() -> None:
    with pytest.raises(ConfigError, match="no engine 'oen'") as refused:
        layers(defaults={"oen": {}})
    assert "'one'" in (refused.value.hint or "")


def test_the_engine_is_a_setting_and_one_for_all_models_only_holds_where_it_can_serve() -> None:
    both = record("one,two")
    assert layers().engine(both).name == "one"
    assert layers("[models.'*']\nengine = 'two'\n").engine(both).name == "two"
    assert layers("[models.'*']\nengine = 'two'\n").engine(record("one")).name == "one"
    assert layers("[models.m]\nengine = 'one'\n[models.'*']\nengine = 'two'\n").engine(both).name == "one"
    assert layers("[models.m]\nengine = 'one'\n").engine(both, {"engine": "two"}).name == "two"
    with pytest.raises(UsageError, match="cannot serve"):
        layers("[models.m]\nengine = 'two'\n").engine(record("one"))


def test_how_a_model_is_kept_comes_from_the_same_places() -> None:
    fleet = FleetSettings(keep_alive=60.0, replicas=2, models={"m": ModelFleet(replicas=3)})
    kept = layers("[models.'*']\nkeep_alive = -1\n", fleet).keeping(record())
    assert (kept["keep_alive"].value, kept["replicas"].value, kept["pin"].value) == (-1, 3, False)
    assert kept["replicas"].where == "config.toml [fleet.models.m]"
    kept = layers("[models.'other:1']\nreplicas = 4\npin = true\nruntime = 'docker'\n", fleet).keeping(record())
    assert (kept["replicas"].value, kept["pin"].value, kept["runtime"].value) == (4, True, "docker")
    assert [o.value for o in kept["replicas"].over] == [3, 2]
