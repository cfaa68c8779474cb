"""What follows from how a model is kept: how many of its replicas come and go, and when it is idle."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pierhead.fleet.intent import IDLE_GRACE, Change, change, idle_at
from pierhead.fleet.scheduler import Claim
from pierhead.fleet.state import LEAVING, State

STAYING = [s for s in State if s not in LEAVING]


def claim(name: str, state: State = State.READY, open: int = 0, used: float = 100.0, ready: float = 100.0) -> Claim:
    return Claim(name, "m", 1, state, open, last_used=max(used, ready), ready_at=ready)


sets = st.lists(
    st.builds(claim, st.uuids().map(str), st.sampled_from(STAYING), st.integers(0, 3), st.floats(0, 1e6)), max_size=9
)


def test_one_is_started_at_a_time_and_the_next_once_it_answers() -> None:
    assert change([], 3) == Change(start=True)
    for state in (State.CREATED, State.PREPARING, State.STARTING, State.LOADING):
        assert change([claim("a", state)], 3) == Change()
    assert change([claim("a")], 3) == Change(start=True)
    assert change([claim("a"), claim("b"), claim("c")], 3) == Change()


def test_a_replica_that_waits_for_its_restart_keeps_no_other_from_starting() -> None:
    assert change([claim("a", State.BACKOFF)], 2) == Change(start=True)


def test_where_one_cannot_start_no_other_is_tried() -> None:
    assert change([claim("a"), claim("b", State.FAILED)], 4) == Change()


def test_of_too_many_the_failed_leave_first_then_the_unready_then_the_least_used() -> None:
    have = [
        claim("busy", open=2, used=500),
        claim("fresh", used=900),
        claim("old", used=300),
        claim("coming", State.LOADING),
        claim("failed", State.FAILED),
    ]
    assert change(have, 4).stop == ("failed",)
    assert change(have, 3).stop == ("failed", "coming")
    assert change(have, 2).stop == ("failed", "coming", "old")
    assert change(have, 1).stop == ("failed", "coming", "old", "fresh")
    assert len(change(have, 0).stop) == 5


@given(sets, st.integers(0, 9))
def test_a_change_never_goes_beyond_the_wanted_number(have: list[Claim], wanted: int) -> None:
    made = change(have, wanted)
    assert len(made.stop) == max(0, len(have) - wanted)
    assert not (made.start and made.stop)
    assert not made.start or len(have) < wanted


def test_a_model_is_idle_when_its_last_replica_is() -> None:
    assert idle_at([claim("a", used=100), claim("b", used=400)], 60) == 460
    assert idle_at([claim("a", used=900), claim("b", open=1)], 60) is None
    assert idle_at([claim("a", used=900), claim("b", State.LOADING)], 60) is None
    assert idle_at([claim("a", used=900), claim("b", State.FAILED)], 60) == 960
    assert idle_at([claim("a", used=900)], -1) is None
    assert idle_at([claim("a", State.FAILED)], 60) is None


def test_a_model_that_nobody_used_yet_has_a_moment_however_short_its_keep_alive() -> None:
    assert idle_at([claim("a"), claim("b", ready=130)], 0) == 130 + IDLE_GRACE
    assert idle_at([claim("a", used=131), claim("b", ready=130)], 0) == 131
