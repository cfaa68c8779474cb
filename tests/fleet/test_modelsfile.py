"""models.toml: what it may say, and how it refuses what it does not understand."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import ConfigError
from pierhead.fleet.modelsfile import read

GOOD = """
[models."*"]
parallel = 2

[models.smollm2]
context = 4096
keep_alive = "5m"
pin = true
replicas = 2
runtime = "process"
options = { flash_attn = "on", cache-type-k = "q8_0" }
"""


def test_a_table_has_how_a_model_is_kept_common_settings_and_the_engines_own() -> None:
    file = read(GOOD)
    found = file.of(("smollm2:latest",))
    assert found is not None
    name, table = found
    assert name == "smollm2"
    assert (table.keeping.keep_alive, table.keeping.pin, table.keeping.replicas) == (300.0, True, 2)
    assert table.settings == {"context": 4096, "flash_attn": "on", "cache-type-k": "q8_0"}
    assert file.everybody.settings == {"parallel": 2}
    assert file.of(("other",)) is None


@pytest.mark.parametrize(
    ("line", "place", "hint"),
    [
        ("contxt = 1", "unknown key 'contxt'", "'context'"),
        ("keepalive = 1", "unknown key 'keepalive'", "'keep_alive'"),
        ("flash_attn = 1", "unknown key 'flash_attn'", "`options`"),
        ("context = -1", "bad value -1 for 'context'", "from 0"),
        ("context = true", "bad value True for 'context'", "whole number"),
        ('keep_alive = "soon"', "'soon' is not a time", "5m"),
        ("keep_alive = nan", "not a time", "5m"),
        ("replicas = 0", "bad value 0 for 'replicas'", "from 1 to 64"),
        ("pin = 1", "bad value 1 for 'pin'", "true or false"),
        ('runtime = "moon"', "'moon' for 'runtime'", "auto, process or docker"),
        ("options = 1", "options must be a table", "options ="),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(line: str, place: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(f'[models."a/b:1"]\n{line}\n')
    assert "models.a/b:1" in refused.value.message
    assert place in refused.value.message
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize("text", ["models = 1", "[model.a]", "[models]\na = 1", "[models.a", "x = 1"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        read(text)


@given(st.text())
def test_no_text_does_worse_than_a_refusal(text: str) -> None:
    with contextlib.suppress(ConfigError):
        read(text)
