"""How a route is split: shares, stickiness, conditions, fallbacks and shadows."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pierhead.routing.split import (
    Allowance,
    Asked,
    Condition,
    Decision,
    Destination,
    Mirror,
    Rule,
    Split,
    Sticky,
    decide,
    drawn,
    weighted,
)

WEIGHTS = st.lists(st.floats(0.05, 20), min_size=2, max_size=5)


def destinations(weights: list[float]) -> tuple[Destination, ...]:
    return tuple(Destination(f"d{i}", w) for i, w in enumerate(weights))


@settings(max_examples=25, deadline=None)
@given(WEIGHTS, st.booleans())
def test_each_destination_gets_its_share_by_lot_and_by_hash(weights: list[float], hashed: bool) -> None:
    to, dice = destinations(weights), random.Random(1)
    count = 4000
    got = Counter(weighted(f"user{i}", to) if hashed else drawn(dice.random(), to) for i in range(count))
    for destination in to:
        share = destination.weight / sum(weights)
        slack = 5 * (share * (1 - share) / count) ** 0.5 + 1 / count
        assert abs(got[destination.name] / count - share) <= slack


@settings(max_examples=25, deadline=None)
@given(WEIGHTS, st.data())
def test_a_changed_weight_moves_only_as_many_users_as_the_share_changed(
    weights: list[float], data: st.DataObject
) -> None:
    which = data.draw(st.integers(0, len(weights) - 1))
    changed = [data.draw(st.floats(0.05, 20)) if i == which else w for i, w in enumerate(weights)]
    before, after = destinations(weights), destinations(changed)
    count = 2000
    moved = 0
    for i in range(count):
        a, b = weighted(f"u{i}", before), weighted(f"u{i}", after)
        if a != b:
            assert f"d{which}" in (a, b)  # nobody moves between the others
            moved += 1
    share = abs(weights[which] / sum(weights) - changed[which] / sum(changed))
    assert moved / count <= share + 5 * (share * (1 - share) / count) ** 0.5 + 2 / count


def test_a_weight_of_nothing_gets_nobody() -> None:
    to = (Destination("a", 0), Destination("b", 1))
    assert {weighted(f"u{i}", to) for i in range(100)} == {"b"}
    assert {drawn(i / 100, to) for i in range(100)} == {"b"}
    assert drawn(0.0, to[:1]) == weighted("u", to[:1]) == ""
    assert decide(Split(to[:1], fallbacks=("f",)), Asked(), 0.5) == Decision("f")


@pytest.mark.parametrize("sticky", [Sticky.USER, Sticky.CONVERSATION, Sticky.KEY])
def test_who_is_recognised_stays_whatever_the_dice_say(sticky: Sticky) -> None:
    split = Split(destinations([1, 1, 1]), sticky=sticky)
    for i in range(30):
        asked = Asked(key=f"k{i}", user=f"u{i}", conversation=f"c{i}")
        assert len({decide(split, asked, dice / 10).first for dice in range(10)}) == 1


def test_who_cannot_be_recognised_falls_back_on_the_key_and_then_on_the_dice() -> None:
    split = Split(destinations([1, 1]), sticky=Sticky.USER)
    assert len({decide(split, Asked(key="k"), dice / 10).first for dice in range(10)}) == 1
    assert len({decide(split, Asked(), dice / 10).first for dice in range(10)}) == 2


def test_equal_user_names_of_different_keys_are_different_users() -> None:
    split = Split(destinations([1, 1]), sticky=Sticky.USER)
    assert len({decide(split, Asked(key=f"k{i}", user="me"), 0.0).first for i in range(50)}) == 2


def test_the_first_rule_that_fits_decides() -> None:
    beta, team, rest = (Destination("beta"),), (Destination("team"),), (Destination("rest"),)
    split = Split(
        rest,
        rules=(
            Rule((Condition("yes", header="X-Beta"),), beta),
            Rule((Condition("team-", prefix=True), Condition("eu", header="x-region")), team),
        ),
    )

    def first(key: str = "", **headers: str) -> str:
        return decide(split, Asked(key, headers={k.replace("_", "-"): v for k, v in headers.items()}), 0.5).first

    assert first(x_beta="yes") == "beta"
    assert first(x_beta="yess") == "rest"
    assert first("team-a", x_region="eu") == "team"
    assert first("team-a") == first(x_region="eu") == first("ateam-", x_region="eu") == "rest"
    assert decide(split, Asked("team-a"), 0.5).first == "rest"


def test_an_empty_value_matches_nobody_who_sends_nothing() -> None:
    split = Split((Destination("rest"),), rules=(Rule((Condition("", prefix=True),), (Destination("any key"),)),))
    assert decide(split, Asked(), 0.0).first == "rest"
    assert decide(split, Asked("k"), 0.0).first == "any key"


def test_fallbacks_follow_in_order_and_nobody_is_asked_twice() -> None:
    split = Split((Destination("a"),), fallbacks=("b", "a", "c", "b"))
    assert decide(split, Asked(), 0.0) == Decision("a", ("b", "c"))


def test_a_share_is_mirrored_but_never_to_who_answers() -> None:
    split = Split((Destination("a"),), mirror=Mirror("m", 0.25))
    assert sum(decide(split, Asked(), 0.0, i / 100).mirror == "m" for i in range(100)) == 25
    assert decide(Split((Destination("m"),), mirror=Mirror("m", 1)), Asked(), 0.0, 0.0).mirror == ""


def test_an_allowance_fills_itself_up_to_its_burst() -> None:
    allowance = Allowance(60, burst=2)
    assert [allowance.take(10.0) for _ in range(3)] == [True, True, False]
    assert not allowance.take(10.9)
    assert allowance.take(11.0)
    assert [allowance.take(1000.0) for _ in range(3)] == [True, True, False]
