"""The queue's discipline: order, fairness, deadlines, bounds and what it tells about the wait."""

from __future__ import annotations

from collections import Counter
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pierhead.routing.queue import FairQueue, Speed, Waiting


def entry(key: str = "k", cost: int = 100, priority: int = 0, deadline: float = inf) -> Waiting:
    return Waiting(key, cost, priority, deadline)


def drain(queue: FairQueue, now: float = 0.0) -> list[Waiting]:
    out: list[Waiting] = []
    while (taken := queue.pop(now)) is not None:
        out.append(taken)
    return out


def test_equals_leave_in_the_order_they_came() -> None:
    queue = FairQueue(10)
    given = [entry() for _ in range(5)]
    assert all(queue.put(e) for e in given)
    assert drain(queue) == given


def test_one_keys_thousand_requests_do_not_delay_anothers_first() -> None:
    queue = FairQueue(2000)
    for _ in range(1000):
        queue.put(entry("greedy"))
    for _ in range(10):
        queue.pop(0.0)
    modest = entry("modest")
    queue.put(modest)
    assert queue.position(modest) <= 2
    assert modest in [queue.pop(0.0) for _ in range(2)]


def test_keys_share_by_tokens_and_not_by_requests() -> None:
    queue = FairQueue(2000)
    for _ in range(400):
        queue.put(entry("long", cost=1000))
        queue.put(entry("short", cost=100))
        queue.put(entry("short", cost=100))
    served: Counter[str] = Counter()
    for _ in range(440):
        taken = queue.pop(0.0)
        assert taken is not None
        served[taken.key] += taken.cost
    assert served["long"] == pytest.approx(served["short"], rel=0.05)


def test_higher_priorities_go_first_but_lower_ones_have_their_share() -> None:
    queue = FairQueue(1000, share=5)
    for _ in range(100):
        queue.put(entry(priority=1))
        queue.put(entry(priority=0))
        queue.put(entry(priority=-3))
    first = [e.priority for e in (queue.pop(0.0) for _ in range(70)) if e]
    assert first[:4] == [1, 1, 1, 1]
    counted = Counter(first)
    assert counted[1] >= 40
    assert counted[0] >= 10
    assert counted[-3] >= 10


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    queue = FairQueue(4)
    for _ in range(4):
        assert queue.put(entry())
    assert queue.full
    assert not queue.put(entry())
    assert queue.retry_after(2) == 1  # nothing was measured yet
    for _ in range(50):
        queue.speed.served(3.0, 100)
    assert queue.retry_after(1) == 15  # four that wait and the one that runs
    assert queue.retry_after(5) == 3


def test_a_request_whose_time_is_over_is_never_let_in() -> None:
    queue = FairQueue(10)
    late, good = entry(deadline=5.0), entry("other", deadline=50.0)
    queue.put(late)
    queue.put(good)
    assert queue.next_deadline == 5.0
    assert queue.expire(4.0) == []
    assert queue.pop(6.0) is good
    queue.put(late := entry(deadline=5.0))
    queue.put(good := entry(deadline=9.0))
    assert queue.expire(6.0) == [late]
    assert not late.queued
    assert list(queue) == [good]


def test_who_left_is_out_at_once_and_did_not_use_up_its_keys_share() -> None:
    queue = FairQueue(1000)
    gone = [entry("a") for _ in range(500)]
    for e in gone:
        queue.put(e)
    queue.put(other := entry("b"))
    for e in gone:
        assert queue.remove(e)
        assert not queue.remove(e)
    queue.put(back := entry("a"))
    queue.put(last := entry("b"))
    assert drain(queue) == [other, back, last]
    assert len(queue) == 0


def test_the_wait_that_is_told_comes_from_what_was_measured() -> None:
    queue = FairQueue(100)
    entries = [entry() for _ in range(10)]
    for e in entries:
        queue.put(e)
    assert queue.wait(entries[3], 2) is None
    for _ in range(100):
        queue.speed.served(2.0, 100)
    assert queue.wait(entries[0], 1) == pytest.approx(2.0)
    assert queue.wait(entries[3], 2) == pytest.approx(4.0)
    assert queue.position(entries[3]) == 4
    urgent = entry(priority=9)
    queue.put(urgent)
    assert queue.position(entries[3]) == 5
    assert queue.wait(urgent, 1) == pytest.approx(2.0)
    queue.remove(entries[0])
    assert queue.position(entries[0]) == 0
    assert queue.wait(entries[0], 1) == 0


def test_a_few_measurements_are_enough_and_a_change_shows() -> None:
    speed = Speed()
    assert speed.seconds(0, 1, 1) is None
    speed.served(4.0, 10)
    assert speed.seconds(0, 1, 1) == pytest.approx(4.0)
    for _ in range(60):
        speed.served(1.0, 10)
    assert speed.seconds(0, 1, 1) == pytest.approx(1.0, rel=0.02)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("put", "put", "pop", "remove", "expire")),
        st.sampled_from("abc"),
        st.integers(0, 500),
        st.integers(-1, 1),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(0, 20))
def test_nobody_is_lost_doubled_or_let_in_late_and_the_bound_holds(
    steps: list[tuple[str, str, int, int]], limit: int
) -> None:
    queue, inside, now = FairQueue(limit), list[Waiting](), 0.0
    for what, key, number, priority in steps:
        now += 1
        if what == "put":
            e = entry(key, number, priority, deadline=now + 1 + number % 20)
            assert queue.put(e) == (len(inside) < limit)
            inside += [e] if e.queued else []
        elif what == "pop":
            taken = queue.pop(now)
            inside = [e for e in inside if e.queued]
            assert taken is None or (taken not in inside and taken.deadline > now)
        elif what == "remove" and inside:
            assert queue.remove(inside.pop(number % len(inside)))
        elif what == "expire":
            late = queue.expire(now)
            assert all(e.deadline <= now for e in late)
            inside = [e for e in inside if e not in late]
        assert sorted(map(id, queue)) == sorted(map(id, inside))
        assert len(queue) == len(inside)
        assert sorted(queue.position(e) for e in inside) == list(range(1, len(inside) + 1))
    assert all(e in inside for e in drain(queue, now))
    assert len(queue) == 0


def test_the_books_about_keys_stay_bounded() -> None:
    queue = FairQueue(100)
    queue.put(entry("resident"))
    for i in range(5000):
        queue.put(entry(f"k{i}", cost=1))
        queue.pop(0.0)
    levels = queue._levels.values()  # pyright: ignore[reportPrivateUsage]
    assert sum(len(level.ends) for level in levels) < 300
