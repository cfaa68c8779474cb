"""Dynamic batching by itself: what goes together, what waits, what is refused; no model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.engines.programs.onnx.batching import WASTE, Batcher, Item, choose
from pierhead.engines.programs.onnx.faults import Refused
from pierhead.engines.programs.onnx.metrics import Metrics

pytestmark = pytest.mark.timeout(30)


class Model:
    """Answers each item with its work; can be held at a gate."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, batch: list[Item]) -> list[Any]:
        self.batches.append([item.work for item in batch])
        self.entered.release()
        assert self.gate.wait(10)
        if any(item.work == "poison" for item in batch):
            raise ValueError("bad tensor")
        return [item.work for item in batch]


def batcher(model: Callable[[list[Item]], list[Any]], **change: Any) -> Batcher:
    how: dict[str, Any] = {"max_batch": 4, "max_tokens": 1 << 20, "delay": 0.0, "queue": 16, "workers": 1}
    return Batcher(model, metrics=Metrics(), **(how | change))


def here() -> bool:
    return False


async def held(model: Model, made: Batcher) -> asyncio.Task[list[Any]]:
    """A request that is in the model and stays there."""
    model.gate.clear()
    task = asyncio.create_task(made.submit([Item("held")], here))
    assert await asyncio.to_thread(model.entered.acquire, timeout=10)
    return task


async def test_requests_that_come_while_the_model_works_share_the_next_run() -> None:
    model = Model()
    made = batcher(model)
    first = await held(model, made)
    others = [asyncio.create_task(made.submit([Item(n)], here)) for n in range(4)]
    await asyncio.sleep(0)
    model.gate.set()
    assert [await other for other in others] == [[0], [1], [2], [3]]
    assert await first == ["held"]
    assert model.batches == [["held"], [0, 1, 2, 3]]


async def test_requests_of_the_same_moment_go_along_at_once() -> None:
    model = Model()
    made = batcher(model)
    await asyncio.gather(*(made.submit([Item(n)], here) for n in range(3)))
    assert model.batches == [[0, 1, 2]]


async def test_a_lone_client_never_waits_for_company() -> None:
    model = Model()
    made = batcher(model, delay=30.0)
    for n in range(3):
        assert await made.submit([Item(n)], here) == [n]
    assert model.batches == [[0], [1], [2]]


async def test_after_company_a_batch_waits_for_more_up_to_the_delay() -> None:
    model = Model()
    made = batcher(model, delay=0.05)
    await asyncio.gather(*(made.submit([Item(n)], here) for n in range(2)))
    began = time.monotonic()
    await made.submit([Item("late")], here)
    assert time.monotonic() - began >= 0.05
    assert model.batches[-1] == ["late"]


async def test_a_full_batch_does_not_wait() -> None:
    model = Model()
    made = batcher(model, delay=30.0)
    await asyncio.gather(*(made.submit([Item(n)], here) for n in range(2)))
    await asyncio.gather(*(made.submit([Item(n)], here) for n in range(4)))
    assert model.batches[-1] == [0, 1, 2, 3]


async def test_beyond_the_bound_a_request_is_refused_and_the_others_are_answered() -> None:
    model = Model()
    made = batcher(model, queue=2)
    first = await held(model, made)
    waiting = asyncio.create_task(made.submit([Item(1), Item(2)], here))
    await asyncio.sleep(0)
    with pytest.raises(Refused) as refused:
        await made.submit([Item(3)], here)
    assert refused.value.status == 429
    model.gate.set()
    assert (await waiting, await first) == ([1, 2], ["held"])


async def test_a_request_larger_than_the_queue_is_taken_when_nobody_waits() -> None:
    model = Model()
    made = batcher(model, queue=2)
    assert await made.submit([Item(n) for n in range(10)], here) == list(range(10))


async def test_what_nobody_wants_any_more_is_not_run() -> None:
    model = Model()
    made = batcher(model)
    first = await held(model, made)
    left = True
    gone = asyncio.create_task(made.submit([Item("gone")], lambda: left))
    cancelled = asyncio.create_task(made.submit([Item("cancelled")], here))
    kept = asyncio.create_task(made.submit([Item("kept")], here))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.sleep(0)
    model.gate.set()
    assert (await kept, await first) == (["kept"], ["held"])
    assert model.batches == [["held"], ["kept"]]
    gone.cancel()


async def test_one_bad_item_fails_alone() -> None:
    model = Model()
    made = batcher(model)
    bad, good = await asyncio.gather(
        made.submit([Item("poison")], here), made.submit([Item("fine")], here), return_exceptions=True
    )
    assert isinstance(bad, ValueError)
    assert good == ["fine"]


async def test_items_of_different_keys_never_meet() -> None:
    model = Model()
    made = batcher(model)
    await asyncio.gather(*(made.submit([Item(n, key=n % 2)], here) for n in range(4)))
    assert model.batches == [[0, 2], [1, 3]]


async def test_several_workers_run_batches_side_by_side() -> None:
    model = Model()
    made = batcher(model, workers=2)
    first = await held(model, made)
    second = asyncio.create_task(made.submit([Item("second")], here))
    assert await asyncio.to_thread(model.entered.acquire, timeout=10)
    model.gate.set()
    assert (await first, await second) == (["held"], ["second"])


async def test_what_waits_is_told_when_the_server_ends() -> None:
    model = Model()
    made = batcher(model)
    first = await held(model, made)
    waiting = asyncio.create_task(made.submit([Item(1)], here))
    await asyncio.sleep(0)
    made.close()
    with pytest.raises(Refused, match="ending"):
        await waiting
    model.gate.set()
    await first


items = st.lists(st.builds(Item, st.integers(), st.integers(1, 512), st.integers(1, 3)), min_size=1, max_size=60)


@given(items, st.integers(1, 16), st.integers(1, 2048))
def test_a_batch_has_the_oldest_item_and_keeps_all_bounds(waiting: list[Item], rows: int, tokens: int) -> None:
    batch = choose(waiting, rows, tokens)
    assert any(item is waiting[0] for item in batch)
    if len(batch) > 1:
        longest, total = max(item.length for item in batch), sum(item.rows for item in batch)
        assert total <= rows
        assert longest * total <= tokens
        assert sum(item.length * item.rows for item in batch) >= longest * total * (1 - WASTE) - 1e-6


@given(items, st.integers(1, 16))
def test_everything_that_waits_is_run_in_the_end(waiting: list[Item], rows: int) -> None:
    left = list(waiting)
    runs = 0
    while left:
        taken = set(map(id, choose(left, rows, 4096)))
        left = [item for item in left if id(item) not in taken]
        runs += 1
    assert runs <= len(waiting)
