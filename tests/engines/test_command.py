"""Templates of engines: what is refused, and what becomes of a command's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from pierhead.config import EngineTemplate, Settings, load
from pierhead.engines import bridge
from pierhead.engines.base import PlanRequest
from pierhead.engines.command import Command
from pierhead.engines.registry import engines
from pierhead.errors import ConfigError, UsageError
from pierhead.store.model import ModelFile

GOOD: dict[str, Any] = {"formats": ["gguf"], "serves": ["chat"], "command": ["server", "$(PORT)"]}


def command(**changes: Any) -> Command:
    return Command("mine", msgspec.convert({**GOOD, **changes}, EngineTemplate))


def words(made: Command, name: str = "m", weights: str = "w.gguf", **settings: Any) -> list[str]:
    files = (ModelFile(weights, 10, "weights", format="gguf"),)
    argv = made.plan(PlanRequest("r", name, Path("/m"), files, {}, made.validate(settings))).spec.argv
    return list(argv[argv.index("--") + 1 :])


@pytest.mark.parametrize(
    ("changes", "said", "hint"),
    [
        ({"serves": ["chatt"]}, "no operation 'chatt'", "chat"),
        ({"command": ["a", "$(PROT)"]}, "no place 'PROT'", "PORT"),
        ({"command": ["a", "$(PORT)", "{contxt}"], "settings": {"context": 1}}, "no setting 'contxt'", "context"),
        ({"command": ["a"]}, "neither $(PORT) nor $(SOCKET)", "--port"),
        ({"command": ["a", "$(PORT)", "$(SOCKET)"]}, "both $(PORT) and $(SOCKET)", "--port"),
        ({"command": []}, "needs formats", "empty"),
        ({"settings": {"context": "long"}}, "context is a number", "context = 1"),
        ({"settings": {"A B": 1}}, "a setting 'A B'", "max_batch"),
        ({"health": "up"}, "health is no path", "/health"),
        ({"memory": "much"}, "memory 'much'", "2GiB"),
        ({"image": "x", "requirements": ["y"]}, "an image and requirements", "one of them"),
        ({"mounts": ["/"]}, "mounts '/'", "whole path"),
        ({"mounts": ["here"]}, "mounts 'here'", "whole path"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_what_to_write(changes: Any, said: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        command(**changes)
    assert said in refused.value.message
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ('[engines.mine]\nformat = ["gguf"]', "unknown key in [engines.mine] 'format'", "formats"),
        ("[engines]\nmine = 1", "is no engine", "[engines.my-server]"),
        ('[engines."My Own"]\n', "is no engine", "[engines.my-server]"),
        ("[engines.mine]\nformats = 1", "Expected `array`", "unknown-engine"),
        ('[engines.mine]\nformats = ["gguf"]\nserves = ["chat"]', "missing required field `command`", "unknown-engine"),
    ],
)
def test_a_table_that_is_no_template_is_refused(tmp_path: Path, text: str, said: str, hint: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "config.toml", {})
    assert said in refused.value.message
    assert hint in (refused.value.hint or "")


def test_the_environment_cannot_bring_an_engine_and_none_takes_a_built_in_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="settings file only"):
        load(tmp_path / "none", {"PIERHEAD_ENGINES__MINE": "{}"})
    with pytest.raises(ConfigError, match="name of an engine that is there"):
        engines(Settings(engines={"llamacpp": msgspec.convert(GOOD, EngineTemplate)}))


def test_settings_keep_the_types_of_their_defaults() -> None:
    made = command(
        command=["s", "$(PORT)", "{n}", "{x}", "{on}", "{word}", "{{literal}}"],
        settings={"n": 1, "x": 0.5, "on": False, "word": "a"},
    )
    assert words(made) == ["s", "$(PORT)", "1", "0.5", "false", "a", "{literal}"]
    assert words(made, n="7", x="2", on="yes", word="b c; rm -rf /")[2:6] == ["7", "2.0", "true", "b c; rm -rf /"]
    for bad in ({"n": "x"}, {"n": 1.5}, {"on": "perhaps"}, {"word": "--flag"}, {"word": "a\nb"}, {"x": None}):
        with pytest.raises(UsageError, match="bad value"):
            made.validate(bad)


def test_nothing_that_a_model_brings_becomes_an_option_or_a_place() -> None:
    made = command(command=["s", "$(PORT)", "$(NAME)", "$(WEIGHTS)", "$(MODEL_DIR)/$(WEIGHTS)", "--w=$(WEIGHTS)"])
    assert words(made, "--evil $(SOCKET)", "-x $(PYTHON).gguf")[2:] == [
        "evil $$(SOCKET)",
        "./-x $$(PYTHON).gguf",
        "$(MODEL_DIR)/-x $$(PYTHON).gguf",
        "--w=-x $$(PYTHON).gguf",
    ]


def test_a_program_outside_the_system_folders_is_mounted_alone(tmp_path: Path) -> None:
    program = tmp_path / "server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    made = command(command=[str(program), "$(PORT)"])
    files = (ModelFile("w.gguf", 10, "weights", format="gguf"),)
    spec = made.plan(PlanRequest("r", "m", Path("/m"), files, {})).spec
    assert [(m.source, m.target, m.read_only) for m in spec.mounts] == [(str(program), str(program), True)]
    assert command(command=["/bin/sh", "$(PORT)"])._mounts == ()


def test_what_is_in_no_image_has_no_recipe_and_an_image_of_ones_own_gets_the_bridge() -> None:
    files = (ModelFile("w.gguf", 10, "weights", format="gguf"),)
    asked = PlanRequest("r", "m", Path("/m"), files, {})
    assert command(command=["/bin/sh", "$(PORT)"]).plan(asked).spec.image is None
    for wheels in ({"requirements": ["my-server==1"], "python": "3.12"}, {"command": ["$(PYTHON)", "$(PORT)"]}):
        made = command(**wheels).plan(asked).spec
        assert made.image is not None
        assert made.image.python == wheels.get("python", "")
    own = command(image="me/server:1").plan(asked).spec
    assert (own.image, own.image_name) == (None, "me/server:1")
    assert [(m.source, m.target) for m in own.mounts] == [(str(bridge.ENTRY), bridge.BESIDE)]
    assert command(image="me/server:1", command=["s", "$(SOCKET)"]).plan(asked).spec.mounts == ()
