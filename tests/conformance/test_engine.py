"""One suite for every engine plugin: its facts, its settings and its plans, without starting anything.

A plugin's sample model is ``engines/NAME.json`` beside this file: ``files`` and ``metadata`` as the store has them,
``settings`` that it takes, and ``typo``: a misspelt setting and the one that is meant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from pierhead.config import load
from pierhead.engines.base import Engine, LaunchSpec, PlanRequest
from pierhead.engines.registry import choose, engines
from pierhead.errors import OutOfMemory, UsageError
from pierhead.gateway.operations import OPERATIONS
from pierhead.runtimes.base import Places, expand
from pierhead.store.model import ModelFile

TEMPLATES = Path(__file__).parent / "templates" / "engines.toml"
ALL = engines(load(TEMPLATES, {}).settings)
WORDS = {"chat", "completions", "embeddings", "rerank", "classify", "infer", "predict", "transcriptions", "speech"} | {
    "translations", "images", "vision", "tools", "thinking"
}  # fmt: skip


class Sample(msgspec.Struct, forbid_unknown_fields=True):
    """See the head of this file."""

    files: tuple[ModelFile, ...]
    metadata: dict[str, Any]
    settings: dict[str, Any]
    typo: tuple[str, str]


def sample(engine: Engine) -> Sample:
    text = (Path(__file__).parent / "engines" / f"{engine.name}.json").read_bytes()
    return msgspec.json.decode(text, type=Sample)


def ask(engine: Engine, free: int = 64 << 30, **settings: Any) -> PlanRequest:
    given = sample(engine)
    wanted = engine.validate({**given.settings, **settings})
    return PlanRequest("rconform", "a/model:1", Path("/models/m"), given.files, given.metadata, wanted, free, 2)


each = pytest.mark.parametrize("engine", ALL, ids=lambda e: e.name)


@each
def test_its_facts_are_whole_and_name_only_what_the_gateway_knows(engine: Engine) -> None:
    facts = engine.facts
    assert facts.name == engine.name
    assert facts.title
    assert facts.formats
    assert facts.serves
    assert set(facts.serves) <= set(OPERATIONS)
    assert set(facts.metrics) <= {"running", "waiting", "cache_usage", "prompt_tokens", "generated_tokens"}


@each
def test_it_takes_its_own_model_and_is_found_by_name(engine: Engine) -> None:
    files = sample(engine).files
    assert engine.accepts(files)
    assert choose(ALL, files, engine.name) is engine
    assert not engine.accepts((ModelFile("README.md", 1, "doc"),))
    assert not engine.accepts(())


@each
def test_it_says_what_it_would_do_with_its_model(engine: Engine) -> None:
    given = sample(engine)
    said = engine.capabilities(given.files, given.metadata)
    assert said
    assert set(said) <= WORDS


@each
def test_a_misspelt_setting_is_refused_with_the_one_that_is_meant(engine: Engine) -> None:
    wrong, meant = sample(engine).typo
    with pytest.raises(UsageError) as refused:
        engine.validate({wrong: 1})
    assert wrong in refused.value.message
    assert refused.value.data["parameter"] == wrong
    assert meant in (refused.value.hint or "")


@each
def test_validating_twice_changes_nothing(engine: Engine) -> None:
    once = engine.validate(sample(engine).settings)
    assert engine.validate(once) == once


@each
def test_a_plan_can_be_written_down_and_started_anywhere(engine: Engine) -> None:
    spec = engine.plan(ask(engine)).spec
    assert msgspec.json.decode(msgspec.json.encode(spec), type=LaunchSpec) == spec
    argv, env = expand(spec, Places("/bin/python", "/engine/entry", "/model", "/run/pierhead/engine.sock"))
    assert any("/run/pierhead/engine.sock" in word for word in argv), "it must listen where the gateway looks"
    assert not any(
        "$(" in word.replace("$(PORT)", "").replace("$(METRICS_PORT)", "") for word in (*argv, *env.values())
    )
    assert (spec.replica, spec.model, spec.engine) == ("rconform", "a/model:1", engine.name)
    assert spec.model_dir == "/models/m"
    assert spec.serves
    assert set(spec.serves) <= set(engine.facts.serves)
    assert spec.image is not None or spec.image_name
    assert spec.readiness.path.startswith("/")
    if spec.entry:
        assert Path(spec.entry).exists()


@each
def test_the_same_wishes_give_the_same_plan(engine: Engine) -> None:
    assert engine.plan(ask(engine)) == engine.plan(ask(engine))


@each
def test_a_plan_claims_memory_and_the_limit_leaves_room(engine: Engine) -> None:
    plan = engine.plan(ask(engine))
    assert plan.memory > 0
    assert plan.spec.limits.memory >= plan.memory


@each
def test_what_does_not_fit_is_refused_with_the_numbers(engine: Engine) -> None:
    with pytest.raises(OutOfMemory) as refused:
        engine.plan(ask(engine, free=1 << 20))
    assert refused.value.data["free"] == 1 << 20
    assert refused.value.data["needed"] > 1 << 20
    assert refused.value.hint


@each
def test_text_that_looks_like_a_place_or_a_flag_stays_text(engine: Engine) -> None:
    given = sample(engine)
    wanted = engine.validate(given.settings)
    named = PlanRequest(
        "rconform", "--evil $(SOCKET)", Path("/models/m"), given.files, given.metadata, wanted, 64 << 30, 2
    )
    argv, _ = expand(engine.plan(named).spec, Places("/bin/python", "/engine/entry", "/model", "/s/engine.sock"))
    assert not any("--evil /s/engine.sock" in word for word in argv)
    assert "--evil" not in argv


def test_a_name_that_is_no_engine_is_refused_with_the_closest() -> None:
    with pytest.raises(UsageError, match="there is no engine 'lamacpp'") as refused:
        choose(ALL, sample(ALL[0]).files, "lamacpp")
    assert "llamacpp" in (refused.value.hint or "")
