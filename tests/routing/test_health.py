"""The circuit of a replica: what opens it, how long, and what closes it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pierhead.routing.health import Circuit, Health, Tolerance


def broken(health: Health, now: float = 0.0) -> Health:
    for _ in range(3):
        health.failure(now)
    return health


def test_a_few_failures_in_a_row_open_it() -> None:
    health = Health()
    health.failure(0.0)
    health.failure(0.0)
    assert health.allows(0.0)
    health.success(0.0)
    health.failure(0.0)
    health.failure(0.0)
    assert health.allows(0.0)
    health.failure(0.0)
    assert not health.allows(0.5)


def test_one_failure_in_two_opens_it_though_never_three_in_a_row() -> None:
    health = Health()
    for _ in range(40):
        health.success(0.0)
        health.failure(0.0)
    assert health.state is Circuit.OPEN


def test_after_a_pause_one_request_decides() -> None:
    health = broken(Health())
    assert not health.allows(0.99)
    assert health.allows(1.0)
    health.sending(1.0)
    assert health.state is Circuit.HALF_OPEN
    assert not health.allows(1.1)
    health.success(1.2)
    assert health.state is Circuit.CLOSED
    assert health.allows(1.2)


def test_each_pause_is_twice_the_last_up_to_a_bound_and_a_long_good_time_resets_it() -> None:
    health = broken(Health(Tolerance(initial=1.0, maximum=8.0)))
    pauses, now = [health.until], health.until
    for _ in range(5):
        health.sending(now)
        health.failure(now)
        pauses.append(health.until - now)
        now = health.until
    assert pauses == [1, 2, 4, 8, 8, 8]
    health.sending(now)
    health.success(now)
    assert not health.spotless
    broken(health, now)
    assert health.until - now == 8  # well once is not well
    now = health.until
    health.sending(now)
    for _ in range(40):
        health.success(now)
    assert health.spotless
    broken(health, now)
    assert health.until - now == 1


def test_jitter_shortens_a_pause_by_a_quarter_at_most() -> None:
    health = Health()
    for _ in range(3):
        health.failure(0.0, 1.0)
    assert health.until == 0.75


def test_requests_that_were_under_way_when_it_opened_change_nothing() -> None:
    health = broken(Health())
    until = health.until
    health.success(0.1)
    health.failure(0.1)
    assert (health.state, health.until) == (Circuit.OPEN, until)


def test_a_request_that_decides_and_vanishes_leaves_the_decision_to_the_next() -> None:
    health = broken(Health())
    health.sending(1.0)
    health.abandoned(1.5)
    assert health.allows(1.5)
    health.sending(1.5)
    assert not health.allows(2.0)
    assert health.allows(62.0)  # lost without a word


def test_a_good_probe_shortens_the_pause_and_a_bad_one_counts_as_a_failure() -> None:
    health = broken(Health())
    health.probed(True, 0.2)
    assert health.allows(0.2)
    health.probed(False, 0.3)
    assert not health.allows(1.2)
    idle = Health()
    for _ in range(3):
        idle.probed(False, 0.0)
    assert not idle.allows(0.1)


@given(st.lists(st.sampled_from(("success", "failure", "sending", "abandoned", "good", "bad")), max_size=100))
def test_it_is_never_closed_for_good(steps: list[str]) -> None:
    health, now = Health(), 0.0
    for step in steps:
        now += 0.3
        if step in ("good", "bad"):
            health.probed(step == "good", now)
        elif step != "sending" or health.allows(now):
            getattr(health, step)(now)
    assert health.allows(now + 61)
