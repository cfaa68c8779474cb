"""Prices: shipped ones, the user's over them, exact to the millionth of a dollar."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pierhead.daemon.prices import info, load, parse
from pierhead.errors import ConfigError
from pierhead.gateway.link import Price
from pierhead.gateway.prices import Prices


def entry(name: str, *aliases: str) -> Any:
    return SimpleNamespace(name=name, aliases=aliases, targets=())


def test_well_known_remote_models_have_prices_and_local_ones_none(tmp_path: Path) -> None:
    prices = Prices(tuple(price for price, _ in load(tmp_path)))

    def of(name: str) -> Price | None:
        return prices.of(entry(name))

    mini = of("gpt-4o-mini-2024-07-18")
    assert mini == Price("gpt-4o-mini*", 150_000, 600_000, 75_000)
    assert of("gpt-4o") == Price("gpt-4o*", 2_500_000, 10_000_000, 1_250_000)
    assert of("gpt-4o-2024-05-13") == Price("gpt-4o-2024-05-13", 5_000_000, 15_000_000)
    assert of("smollm2") is None


def test_the_users_prices_count_before_those_that_ship(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text('["gpt-4o*"]\ninput = 1\noutput = 0.000001\n["*"]\ninput = 0\noutput = 0\n')
    found = load(tmp_path)
    prices = Prices(tuple(price for price, _ in found))
    assert prices.of(entry("gpt-4o-mini")) == Price("gpt-4o*", 1_000_000, 1)
    assert prices.of(entry("x")) == Price("*", 0, 0)
    assert found[0][1].endswith("prices.toml")
    assert info(*found[0]).cached == 1.0
    assert prices.of(entry("y", "gpt-4o")) == Price("gpt-4o*", 1_000_000, 1)


@pytest.mark.parametrize(
    "text",
    [
        "[m]",
        "[m]\ninput = 1",
        "m = 1",
        "[m]\ninput = -1\noutput = 1",
        "[m]\ninput = nan\noutput = 1",
        "[m]\ninput = true\noutput = 1",
        "[m]\ninput = '1'\noutput = 1",
        "[m]\ninput = 1\noutput = 1\ncachd = 1",
        "[m]\ninput = inf\noutput = 1",
        "][",
    ],
)
def test_a_price_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "prices.toml")
    assert caught.value.hint
