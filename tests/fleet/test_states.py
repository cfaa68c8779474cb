"""The replica's state machine and its back-off, as pure functions."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.fleet.state import COMING, LEAVING, TRANSITIONS, Backoff, IllegalTransition, State, Status


@pytest.mark.parametrize(("here", "there"), list(itertools.product(State, State)))
def test_a_replica_moves_only_as_the_table_says(here: State, there: State) -> None:
    status = Status(here, 1.0)
    if there in TRANSITIONS[here]:
        assert status.to(there, 2.0) == Status(there, 2.0)
    else:
        with pytest.raises(IllegalTransition, match=f"{here} cannot become {there}"):
            status.to(there, 2.0)


def test_every_state_but_stopped_can_still_be_stopped() -> None:
    for start in set(State) - {State.STOPPED}:
        seen, todo = {start}, [start]
        while todo:
            new = TRANSITIONS[todo.pop()] - seen
            seen |= new
            todo += new
        assert State.STOPPED in seen


def test_what_leaves_never_comes_back() -> None:
    for state in LEAVING:
        assert TRANSITIONS[state] <= LEAVING
    assert not COMING & LEAVING


@given(st.floats(0.01, 10), st.floats(10, 600), st.integers(0, 20))
def test_back_off_grows_up_to_its_bound_and_then_gives_up(initial: float, maximum: float, limit: int) -> None:
    backoff = Backoff(initial, maximum, limit)
    delays = [backoff.delay(n) for n in range(limit)]
    assert all(d is not None and d <= maximum for d in delays)
    assert delays == sorted(delays, key=lambda d: d or 0)
    assert backoff.delay(limit) is None


def test_a_stable_time_makes_the_restarts_count_anew() -> None:
    backoff = Backoff(0.5, 30, 5, stable=60)
    assert backoff.count(4, ready_for=59.9) == 4
    assert backoff.count(4, ready_for=60) == 0
