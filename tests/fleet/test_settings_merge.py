"""Settings are merged field by field; the last layer wins, and what it stands over is told."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pierhead.fleet.merge import Layer, Over, merge, values

NAMES = st.sampled_from(["context", "parallel", "threads", "cache_type_k"])
ORIGINS = st.sampled_from(["default", "config", "engine config", "packaged", "models.toml", "asked"])
PLACES = st.text(min_size=1, max_size=8)
LAYERS = st.lists(st.builds(Layer, ORIGINS, PLACES, st.dictionaries(NAMES, st.integers())), max_size=7)


def having(layers: list[Layer], name: str) -> list[Over]:
    return [Over(layer.values[name], layer.origin, layer.where) for layer in layers if name in layer.values]


@given(LAYERS)
def test_each_value_is_the_last_layers_that_has_it_and_names_that_layer(layers: list[Layer]) -> None:
    found = merge(layers)
    assert set(found) == {name for layer in layers for name in layer.values}
    for name, setting in found.items():
        last = having(layers, name)[-1]
        assert (setting.name, setting.value, setting.origin, setting.where) == (name, *_of(last))


@given(LAYERS)
def test_what_it_stands_over_is_told_the_nearest_first(layers: list[Layer]) -> None:
    for name, setting in merge(layers).items():
        assert setting.over == tuple(reversed(having(layers, name)[:-1]))


@given(LAYERS, LAYERS)
def test_merging_in_two_steps_gives_the_same_values(low: list[Layer], high: list[Layer]) -> None:
    whole: dict[str, Any] = values(merge([*low, *high]))
    assert values(merge(low)) | values(merge(high)) == whole


def _of(over: Over) -> tuple[Any, ...]:
    return over.value, over.origin, over.where
