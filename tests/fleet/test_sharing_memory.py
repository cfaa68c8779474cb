"""How starts share memory: in order, waiting for the busy, with what was truly used."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pierhead.engines.base import EngineFacts, LaunchSpec, Plan, PlanRequest
from pierhead.engines.gpus import Device
from pierhead.errors import OutOfMemory, UsageError
from pierhead.events import Note
from pierhead.fleet.admission import Admission, Ticket
from pierhead.fleet.memory import Memory
from pierhead.fleet.peaks import Peaks, kind
from pierhead.fleet.scheduler import Claim, Machine, Room
from pierhead.fleet.state import State
from pierhead.fleet.warm import read_ahead

from .conftest import MIB, Planner, Yard

GIB = 1024 * MIB
SPEC = LaunchSpec(replica="r", model="m", engine="toy", argv=("run", "--context", "512"), model_dir="/m")


def patient(yard: Yard, seconds: float = 20.0, **more: Any) -> Yard:
    yard.fleet_settings = msgspec.structs.replace(yard.fleet_settings, memory_wait=seconds, **more)
    return yard


async def soon(reached: Any, timeout: float = 5.0) -> None:
    """Let the loop run until it holds."""
    async with asyncio.timeout(timeout):
        while not reached():  # noqa: ASYNC110  # what is waited for has many causes
            await asyncio.sleep(0)


# --- less ---------------------------------------------------------------------------------------------------------


class Fussy(Planner):
    """An engine that needs a mebibyte for every token, and knows no slots."""

    facts = EngineFacts(name="toy", title="Toy", formats=("gguf",), serves=("embeddings",), common=("context",))

    def plan(self, request: PlanRequest) -> Plan:
        if unknown := request.settings.keys() - {"context"}:
            raise UsageError(f"no setting {unknown}")
        context = int(request.settings.get("context", 2048))
        return super().plan(replace(request, metadata={"needs": context * MIB}, settings={"context": context}))


async def test_an_engine_without_slots_is_tried_with_a_smaller_context_only(yard: Yard) -> None:
    yard.planner = Fussy()
    yard.fleet_settings = msgspec.structs.replace(yard.fleet_settings, shrink="always")
    yard.memory = Memory(1912 * MIB, 1912 * MIB)  # 1,400 MiB above the reserve
    fleet = await yard.open()
    assert (await fleet.ensure_ready("a")).context == 1024
    await fleet.stop_replica("a")
    yard.memory = Memory(662 * MIB, 662 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        await fleet.ensure_ready("a")
    assert caught.value.data["needed"] == 2048 * MIB


class Short(Planner):
    """An engine that gives no model more context than it knows."""

    def plan(self, request: PlanRequest) -> Plan:
        known = min(int(request.settings["context"]), int(request.metadata["context_length"]))
        return super().plan(replace(request, settings={"context": known}))


@pytest.mark.parametrize("on_gpu", [0, 10 * MIB])
async def test_a_context_that_the_model_does_not_know_is_told(yard: Yard, on_gpu: int) -> None:
    yard.planner, yard.gpus = (
        Short(),
        (Device(name="nvidia.com/gpu=0", title="G", total=GIB, free=GIB),) if on_gpu else (),
    )
    metadata = {"needs": MIB, "context_length": 512, "on_gpu": on_gpu}
    yard.store.records["a"] = msgspec.structs.replace(yard.store.records["a"], metadata=metadata)
    fleet = await yard.open()
    replica = await fleet.ensure_ready("a", settings={"context": 4096}, listener=yard.listener)
    told = [e.message for e in yard.events if isinstance(e, Note)]
    assert (replica.context, told) == (512, ["the model knows 512 tokens, not 4,096: it starts with a context of 512"])


async def test_a_claim_tells_how_much_of_it_may_be_mapped(yard: Yard) -> None:
    yard.store.records["a"] = msgspec.structs.replace(yard.store.records["a"], size=60 * MIB)
    fleet = await yard.open()
    await fleet.ensure_ready("a")
    (claim,) = (replica.claim() for replica in fleet.all())
    assert (claim.weights, claim.seen, claim.back) == (60 * MIB, 40 * MIB, 100 * MIB)


# --- waiting ------------------------------------------------------------------------------------------------------


async def test_a_start_waits_for_a_busy_model_and_says_so(yard: Yard) -> None:
    yard.memory = Memory(662 * MIB, 662 * MIB)  # 150 MiB above the reserve: one fits
    fleet = await patient(yard).open()
    busy = await fleet.ensure_ready("a")
    fleet.activity(busy.id, 1, time.time() + 1)
    start = asyncio.create_task(fleet.ensure_ready("b", listener=yard.listener))
    await soon(lambda: any("waiting for memory, which a" in e.message for e in yard.events if isinstance(e, Note)))
    assert not start.done()
    fleet.activity(busy.id, 0, time.time() + 2)
    assert (await asyncio.wait_for(start, 10)).model == "b"
    assert [r.model for r in fleet.replicas()] == ["b"]


async def test_a_start_gives_up_when_its_time_is_over(yard: Yard) -> None:
    yard.memory = Memory(662 * MIB, 662 * MIB)
    fleet = await patient(yard, 0.2).open()
    busy = await fleet.ensure_ready("a")
    fleet.activity(busy.id, 1, time.time() + 1)
    with pytest.raises(OutOfMemory, match=r"nothing came free within 0\.2 s") as caught:
        await fleet.ensure_ready("b")
    assert caught.value.data["holders"][0]["model"] == "a"
    fleet.activity(busy.id, 0, 0)


async def test_one_that_was_just_started_is_not_evicted_before_its_first_request(yard: Yard) -> None:
    yard.memory = Memory(662 * MIB, 662 * MIB)
    fleet = await patient(yard).open()
    first = await fleet.ensure_ready("a")
    start = asyncio.create_task(fleet.ensure_ready("b"))
    await soon(lambda: fleet.waiting == 1)
    assert [r.model for r in fleet.replicas() if r.state == "ready"] == ["a"]
    fleet.activity(first.id, 0, time.time() + 1)
    assert (await asyncio.wait_for(start, 10)).model == "b"


async def test_a_start_that_ends_while_it_waits_lets_the_next_one_pass(yard: Yard) -> None:
    yard.memory = Memory(712 * MIB, 712 * MIB)  # two fit
    fleet = await patient(yard).open()
    yard.store.records["c"] = msgspec.structs.replace(yard.store.records["c"], metadata={"needs": 200 * MIB})
    busy = await fleet.ensure_ready("a")
    fleet.activity(busy.id, 1, time.time() + 1)
    big = asyncio.create_task(fleet.ensure_ready("c"))
    await soon(lambda: fleet.waiting == 1)
    small = asyncio.create_task(fleet.ensure_ready("b"))
    await soon(lambda: fleet.waiting == 2)  # it would fit, but the big one came first
    await fleet.stop_replica("c")
    assert (await asyncio.wait_for(small, 10)).model == "b"
    await asyncio.gather(big, return_exceptions=True)
    fleet.activity(busy.id, 0, 0)


# --- the queue by itself ------------------------------------------------------------------------------------------


def sized(need: int) -> Any:
    def plan(room: Room) -> Plan:
        if room.memory < need:
            raise OutOfMemory("too little", data={"needed": need})
        return Plan(spec=SPEC, context=1, memory=need)

    return plan


class Hall:
    """A ledger and the queue before it; what is evicted leaves when the test says so."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.held: dict[str, Claim] = {}
        self.order: list[str] = []
        self.admission = Admission(self.claims, lambda: Machine(Memory(total, total)), 0, self.evict)

    def claims(self) -> list[Claim]:
        return list(self.held.values())

    def evict(self, names: Sequence[str], ticket: Ticket) -> None:
        for name in names:
            assert self.held[name].evictable
            self.change(name, state=State.DRAINING)

    def change(self, name: str, **news: Any) -> None:
        self.held[name] = Claim(**{f: getattr(self.held[name], f) for f in self.held[name].__dataclass_fields__} | news)

    async def start(self, name: str, need: int) -> None:
        self.held[name] = Claim(name, name, 0, State.CREATED)

        def place(plan: Plan) -> None:
            self.change(name, memory=plan.memory)

        ticket = Ticket(name, sized(need), None, True, place, lambda text: None, 30.0)
        await self.admission.admit(ticket)
        touched = sum(c.memory for c in self.held.values() if c.state is not State.CREATED)
        assert touched + need <= self.total
        self.order.append(name)
        self.change(name, state=State.READY, open=1, last_used=float(len(self.order)))


@given(st.lists(st.integers(1, 10), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=5000)
def test_everybody_is_served_in_the_order_of_asking_and_never_beyond_the_budget(needs: list[int], dice: Any) -> None:
    async def run() -> None:
        hall = Hall(10)
        starts = [asyncio.create_task(hall.start(f"m{n}", need)) for n, need in enumerate(needs)]
        for _ in range(2000):
            await asyncio.sleep(0)
            if all(s.done() for s in starts):
                break
            movable = [c for c in hall.claims() if c.state in (State.READY, State.DRAINING)]
            if movable:
                claim = dice.choice(movable)
                if claim.state is State.DRAINING:
                    del hall.held[claim.replica]
                else:
                    hall.change(claim.replica, open=0)
                hall.admission.look()
        await asyncio.gather(*starts)
        hall.admission.close()
        assert hall.order == [f"m{n}" for n in range(len(needs))]

    asyncio.run(run())


# --- what is truly used -------------------------------------------------------------------------------------------


async def test_what_a_replica_uses_beyond_its_estimate_counts_and_makes_idle_ones_leave(yard: Yard) -> None:
    yard.memory = Memory(812 * MIB, 812 * MIB)  # three fit
    fleet = await patient(yard).open()
    for at, name in enumerate("abc"):
        info = await fleet.ensure_ready(name)
        fleet.activity(info.id, 0, time.time() + 1 + at)
    engine = yard.process.running[fleet.find("c")[0].id]
    engine.uses = (150 * MIB, 900 * MIB)  # its model has one byte of weights: the rest are libraries
    fleet.find("c")[0].ready_at -= 10
    await asyncio.sleep(0)
    fleet._meter._read_at.clear()
    fleet.activity(info.id, 0, time.time() + 10)
    await soon(lambda: len(fleet.replicas()) == 2)
    found = {r.model: r for r in fleet.replicas()}
    assert sorted(found) == ["b", "c"]
    assert (found["c"].memory_estimate, found["c"].memory_peak) == (100 * MIB, 150 * MIB + 1)


async def test_the_next_start_claims_what_the_last_one_was_seen_to_use(yard: Yard, tmp_path: Path) -> None:
    file = tmp_path / "state" / "peaks.json"
    fleet = await yard.open(peaks=file)
    info = await fleet.ensure_ready("a")
    yard.process.running[info.id].uses = (160 * MIB, 0)
    fleet._meter._read_at.clear()
    fleet.activity(info.id, 0, time.time() + 1)
    await soon(lambda: file.exists())
    await fleet.stop_replica("a")
    again = await yard.open(peaks=file)
    assert (await again.ensure_ready("a")).memory_estimate == 160 * MIB
    yard.memory = Memory(662 * MIB, 662 * MIB)
    await again.stop_replica("a")
    with pytest.raises(OutOfMemory, match="was seen to use 160 MiB"):
        await again.ensure_ready("a")


def test_peaks_are_bounded_kept_whole_and_only_grow(tmp_path: Path) -> None:
    file = tmp_path / "peaks.json"
    peaks = Peaks(file)
    assert peaks.learn("k", 100)
    assert not peaks.learn("k", 90)
    assert not peaks.learn("k", 100)
    assert peaks.learn("k", 200)
    for n in range(600):
        peaks.learn(f"k{n}", n + 1)
    peaks.save()
    found = Peaks(file)
    assert len(msgspec.json.decode(file.read_bytes())) == 512
    assert (found.of("k599"), found.of("k")) == (600, 0)
    file.write_bytes(b"{nonsense")
    assert Peaks(file).of("k599") == 0


def test_a_kind_is_the_model_the_engine_and_all_that_it_is_told() -> None:
    other = msgspec.structs.replace(SPEC, argv=("run", "--context", "1024"))
    assert kind("sha256:a", SPEC) == kind("sha256:a", msgspec.structs.replace(SPEC, replica="other"))
    assert len({kind("sha256:a", SPEC), kind("sha256:b", SPEC), kind("sha256:a", other)}) == 3


@pytest.mark.skipif(shutil.which("fincore") is None, reason="util-linux shows what is in memory")
def test_weights_are_read_ahead_by_the_kernel(tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    with file.open("wb") as out:
        out.write(os.urandom(4 * MIB))
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def resident() -> int:
        told = subprocess.run(["fincore", "-nbo", "RES", str(file)], capture_output=True, check=True, text=True)
        return int(told.stdout)

    before = resident()
    read_ahead([file, tmp_path / "absent"])
    deadline = time.monotonic() + 10
    while resident() < 4 * MIB and time.monotonic() < deadline:
        os.sched_yield()
    assert before < 4 * MIB == resident()
