"""The balancing policies: what each prefers, and that their books stay straight."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pierhead.routing.balance import (
    POLICIES,
    CacheAware,
    Job,
    LeastTokens,
    Policy,
    PowerOfTwo,
    RoundRobin,
    Sessions,
    rendezvous,
)

REPLICAS = ("a", "b", "c")


def filled(policy: Policy) -> Policy:
    for name in REPLICAS:
        policy.add(name)
    return policy


def send(policy: Policy, job: Job, now: float = 0.0, to: str = "") -> str:
    policy.dispatch(job, to or policy.choose(job, REPLICAS, now), now)
    return job.replica


def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    policy = filled(CacheAware())
    first = Job(1000, range(10), 100)
    home = send(policy, first)
    policy.done(first, 1.0)
    for _ in range(3):
        again = Job(1100, range(11), 100)
        assert send(policy, again, 2.0) == home
        assert again.miss <= 200
        policy.done(again, 2.0)


def test_a_cached_prompt_goes_elsewhere_when_its_replica_has_more_to_read_than_the_cache_saves() -> None:
    policy = filled(CacheAware())
    home = send(policy, first := Job(1000, range(10), 100))
    policy.done(first, 1.0)
    send(policy, Job(500, range(50, 55), 100), 1.0, home)
    assert send(policy, Job(1000, range(10), 100), 1.0) == home  # 500 queued, 1000 saved
    send(policy, Job(5000, range(60, 110), 100), 1.0, home)
    assert send(policy, Job(1000, range(10), 100), 1.0) != home


def test_prompts_that_nobody_has_spread_evenly() -> None:
    policy = filled(CacheAware())
    placed: Counter[str] = Counter()
    for i in range(300):
        job = Job(1000, range(i * 10, i * 10 + 10), 100)
        placed[send(policy, job, float(i))] += 1
        policy.done(job, i + 0.5)
    assert set(placed.values()) == {100}


def test_what_is_being_read_counts_less_as_time_goes_by() -> None:
    policy = filled(CacheAware())
    send(policy, long := Job(10000), 0.0, "a")
    policy.first_token(long, 10.0)  # 1,000 tokens a second
    policy.done(long, 10.0)
    load = policy.loads["a"]  # type: ignore[attr-defined]
    load.rate = 1000.0
    send(policy, Job(4000), 20.0, "a")
    assert load.queued(20.0) == 4000
    assert load.queued(22.0) == 2000
    assert load.queued(60.0) == 0


def test_the_speed_of_reading_is_measured_and_short_prompts_say_nothing_about_it() -> None:
    policy = filled(CacheAware())
    load = policy.loads["a"]  # type: ignore[attr-defined]
    for i in range(50):
        send(policy, job := Job(1000), i * 10.0, "a")
        policy.first_token(job, i * 10.0 + 0.1)
        policy.first_token(job, i * 10.0 + 5)  # told again: nothing new
        send(policy, short := Job(10), i * 10.0 + 6, "a")
        policy.first_token(short, i * 10.0 + 9)
        policy.done(short, i * 10.0 + 9)
        policy.done(job, i * 10.0 + 9)
    assert load.rate == pytest.approx(10000, rel=0.01)


def test_least_tokens_prefers_who_has_fewest_unanswered() -> None:
    policy = filled(LeastTokens())
    send(policy, Job(100), 0, "a")
    send(policy, c := Job(50), 0, "c")
    b = Job(300)
    assert send(policy, b) == "b"
    assert send(policy, Job(1)) == "c"
    policy.first_token(b, 1.0)
    assert send(policy, Job(1)) == "c"  # an answer under way still counts
    policy.done(b, 2.0)
    policy.done(c, 2.0)
    assert send(policy, Job(1)) == "b"


def test_power_of_two_takes_the_less_busy_of_the_two_drawn() -> None:
    draws = iter([0.0, 0.0] * 3)
    policy = filled(PowerOfTwo(lambda: next(draws)))
    assert [send(policy, Job(1)) for _ in range(3)] == ["a", "b", "a"]
    assert policy.choose(Job(1), ("c",), 0.0) == "c"


def test_round_robin_goes_round() -> None:
    policy = filled(RoundRobin())
    assert [send(policy, Job(1)) for _ in range(6)] == [*REPLICAS, *REPLICAS]


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(("send", "first", "done", "drop", "add")), st.integers(0, 8), st.integers(0, 3000)),
        max_size=60,
    )
)
def test_every_policy_chooses_only_of_those_offered_and_its_books_come_out_even(
    name: str, steps: list[tuple[str, int, int]]
) -> None:
    policy = filled(POLICIES[name]())
    there, jobs, now = list(REPLICAS), list[Job](), 0.0
    for what, number, tokens in steps:
        now += 0.1
        if what == "send" and there:
            among = there[: 1 + number % len(there)]
            job = Job(tokens, range(number, number + tokens // 100), 100)
            policy.dispatch(job, chosen := policy.choose(job, among, now), now)
            assert chosen in among
            jobs.append(job)
        elif what == "first" and jobs:
            policy.first_token(jobs[number % len(jobs)], now)
        elif what == "done" and jobs:
            policy.done(jobs[number % len(jobs)], now)  # also twice
        elif what == "drop" and len(there) > 1:
            policy.remove(there.pop(number % len(there)))
        elif what == "add":
            policy.add(REPLICAS[number % 3])
            there = sorted({*there, REPLICAS[number % 3]})
    for job in jobs:
        policy.done(job, now)
    loads = policy.loads  # type: ignore[attr-defined]
    assert set(loads) == set(there)
    assert all((x.requests, x.tokens, x.reading, x.waiting, x.queued(now)) == (0, 0, 0, 0, 0) for x in loads.values())


def test_a_job_that_never_starts_does_not_make_the_books_grow() -> None:
    policy = filled(CacheAware())
    send(policy, Job(10), 0.0, "a")
    for i in range(5000):
        send(policy, job := Job(10), float(i), "a")
        policy.done(job, float(i))
    assert len(policy.loads["a"].order) < 200  # type: ignore[attr-defined]


def test_a_newcomer_is_not_flooded_with_all_ties() -> None:
    policy = filled(CacheAware())
    for i in range(30):
        send(policy, job := Job(100), float(i))
        policy.done(job, float(i))
    policy.add("d")
    placed: Counter[str] = Counter()
    for i in range(40):
        job = Job(100)
        policy.dispatch(job, policy.choose(job, (*REPLICAS, "d"), 50.0 + i), 50.0 + i)
        policy.done(job, 50.0 + i)
        placed[job.replica] += 1
    assert placed["d"] <= 12


def test_a_session_stays_where_it_is_while_that_is_healthy_and_moves_once_when_it_is_not() -> None:
    sessions = Sessions()
    home = sessions.place("s", REPLICAS)
    assert sessions.place("s", REPLICAS) == home
    rest = tuple(r for r in REPLICAS if r != home)
    moved = sessions.place("s", rest)
    assert moved in rest
    assert sessions.place("s", REPLICAS) == moved


def test_sessions_are_bounded_and_the_one_unused_longest_goes() -> None:
    sessions = Sessions(2)
    for name in ("s", "t", "s", "u"):
        sessions.place(name, REPLICAS)
    assert len(sessions) == 2


def test_first_choices_spread_and_only_those_of_a_leaver_move() -> None:
    keys = [f"s{i}" for i in range(3000)]
    before = {k: rendezvous(k, REPLICAS) for k in keys}
    assert all(900 < n < 1100 for n in Counter(before.values()).values())
    after = {k: rendezvous(k, REPLICAS[:2]) for k in keys}
    assert all(after[k] == before[k] for k in keys if before[k] != "c")
    assert rendezvous("\udcff", REPLICAS) in REPLICAS
