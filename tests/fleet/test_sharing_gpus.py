"""Models share a GPU's memory as they share the machine's: who has it, who leaves for others, what is learnt."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from pierhead.engines.gpus import Device
from pierhead.errors import OutOfMemory
from pierhead.fleet.memory import Memory
from pierhead.fleet.meter import shares
from pierhead.fleet.scheduler import DEVICE_RESERVE
from pierhead.fleet.supervisor import Supervisor

from .conftest import MIB, Engine, Yard

GPU = "nvidia.com/gpu=0"


@pytest.fixture
def shared(yard: Yard) -> Yard:
    """A GPU with 1000 MiB for models; all models want 600 of them, and can sleep."""
    yard.fleet_settings = msgspec.structs.replace(yard.fleet_settings, memory_wait=20.0)
    size = 1000 * MIB + DEVICE_RESERVE
    yard.gpus = (Device(name=GPU, title="Toy GPU", total=size, free=size),)
    for name, record in yard.store.records.items():
        more = {"on_gpu": 600 * MIB, "sleep": ["/sleep", "/wake"]}
        yard.store.records[name] = msgspec.structs.replace(record, metadata={**record.metadata, **more})
    return yard


def engine_of(yard: Yard, fleet: Supervisor, model: str) -> Engine:
    (replica,) = (r for r in fleet.all() if r.life.model.name == model)
    return yard.process.running[replica.id]


async def reach(fleet: Supervisor, model: str, *wanted: str) -> None:
    async with asyncio.timeout(10):
        while [r.state for r in fleet.replicas() if r.model == model] != list(wanted):  # noqa: ASYNC110
            await asyncio.sleep(0)


async def asleep(yard: Yard, fleet: Supervisor, model: str) -> None:
    """It was used, sleeps, and has kept 50 MiB of the GPU."""
    info = await fleet.ensure_ready(model, keep_alive=0.05)
    fleet.activity(info.id, 0, time.time() + 0.01)
    await reach(fleet, model, "dozing")
    await use(yard, fleet, model, 50)
    await reach(fleet, model, "sleeping")
    async with asyncio.timeout(10):
        while fleet.replicas()[0].devices != {GPU: 50 * MIB}:  # noqa: ASYNC110  # no event tells of readings
            await asyncio.sleep(0)


async def use(yard: Yard, fleet: Supervisor, model: str, mib: int) -> None:
    engine = engine_of(yard, fleet, model)
    engine.uses = (MIB, 0)
    yard.gpu_uses[engine.pid] = {GPU: mib * MIB}


async def test_the_idle_leave_the_gpu_for_who_is_asked_for(shared: Yard) -> None:
    shared.fleet_settings = msgspec.structs.replace(shared.fleet_settings, sleep=False)
    fleet = await shared.open()
    first = await fleet.ensure_ready("a")
    assert first.devices == {GPU: 600 * MIB}
    fleet.activity(first.id, 0, time.time() + 1)
    assert (await fleet.ensure_ready("b")).devices == {GPU: 600 * MIB}
    assert [r.model for r in fleet.replicas()] == ["b"]


async def test_who_would_never_fit_is_refused_with_the_gpus_numbers(shared: Yard) -> None:
    fleet = await shared.open()
    record = shared.store.records["a"]
    shared.store.records["a"] = msgspec.structs.replace(record, metadata={**record.metadata, "on_gpu": 1100 * MIB})
    with pytest.raises(OutOfMemory, match=r"needs 1,100 MiB of a GPU's memory, and 1,000 MiB are free on .*Toy GPU"):
        await fleet.ensure_ready("a")
    assert shared.process.starts == 0


def divides(yard: Yard, name: str, mib: int) -> None:
    """A model of which a GPU may have a part."""
    record = yard.store.records[name]
    more = {"on_gpu": mib * MIB, "divides": True}
    yard.store.records[name] = msgspec.structs.replace(record, metadata={**record.metadata, **more})


async def test_a_model_that_could_be_divided_has_the_idle_leave_first(shared: Yard) -> None:
    divides(shared, "b", 700)
    fleet = await shared.open()
    first = await fleet.ensure_ready("a")
    fleet.activity(first.id, 0, time.time() + 1)
    assert (await fleet.ensure_ready("b")).devices == {GPU: 700 * MIB}
    assert [r.model for r in fleet.replicas()] == ["b"]


async def test_a_model_that_never_would_fit_whole_has_what_there_is(shared: Yard) -> None:
    divides(shared, "b", 1100)
    fleet = await shared.open()
    assert (await fleet.ensure_ready("b")).devices == {GPU: 1000 * MIB}


async def test_a_replica_beside_another_has_what_is_left(shared: Yard) -> None:
    divides(shared, "b", 700)
    fleet = await shared.open()
    await fleet.ensure_ready("b", replicas=2)
    async with asyncio.timeout(10):
        while [r.state for r in fleet.replicas()] != ["ready", "ready"]:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert sorted(r.devices[GPU] // MIB for r in fleet.replicas()) == [300, 700]


async def test_a_budget_bounds_each_gpu(shared: Yard) -> None:
    shared.fleet_settings = msgspec.structs.replace(shared.fleet_settings, gpu_budget="500M")
    fleet = await shared.open()
    with pytest.raises(OutOfMemory, match="needs 600 MiB of a GPU's memory, and 244 MiB are free"):
        await fleet.ensure_ready("a")


async def test_what_is_truly_used_of_a_gpu_corrects_the_claim_and_is_remembered(shared: Yard) -> None:
    fleet = await shared.open()
    info = await fleet.ensure_ready("a")
    await use(shared, fleet, "a", 800)
    fleet.activity(info.id, 0, time.time())
    async with asyncio.timeout(10):
        while fleet.replicas()[0].devices_peak != {GPU: 800 * MIB}:  # noqa: ASYNC110  # no event tells of readings
            await asyncio.sleep(0)
    assert fleet.replicas()[0].devices == {GPU: 800 * MIB}
    await fleet.stop_replica("a")
    assert (await fleet.ensure_ready("a")).devices == {GPU: 800 * MIB}


async def test_a_sleeper_lends_its_gpu_and_gets_it_back_when_it_wakes(shared: Yard) -> None:
    fleet = await shared.open()
    await asleep(shared, fleet, "a")
    await fleet.ensure_ready("b")
    assert [(r.model, r.state) for r in fleet.replicas()] == [("a", "sleeping"), ("b", "ready")]
    await swap(shared, fleet, "a", "b", 50)
    assert [r.devices for r in fleet.replicas() if r.model == "a"] == [{GPU: 600 * MIB}]
    assert shared.process.starts == 2


async def swap(yard: Yard, fleet: Supervisor, model: str, other: str, kept: int) -> None:
    """Have ``model`` answer while ``other`` is idle on the GPU, and keeps so many MiB when it sleeps."""
    (info,) = (r for r in fleet.replicas() if r.model == other)
    await use(yard, fleet, other, 600)
    fleet.activity(info.id, 0, time.time() + 1)
    start = asyncio.create_task(fleet.ensure_ready(model, by_request=True))
    await reach(fleet, other, "dozing")
    await use(yard, fleet, other, kept)
    assert (await asyncio.wait_for(start, 20)).state == "ready"


async def test_two_that_can_sleep_change_places_without_a_start(shared: Yard) -> None:
    fleet = await shared.open()
    await fleet.ensure_ready("a")
    await swap(shared, fleet, "b", "a", 50)
    assert [(r.model, r.state) for r in fleet.replicas()] == [("a", "sleeping"), ("b", "ready")]
    await swap(shared, fleet, "a", "b", 50)
    assert [(r.model, r.state) for r in fleet.replicas()] == [("a", "ready"), ("b", "sleeping")]
    assert shared.process.starts == 2


async def test_who_turns_out_to_use_too_much_has_another_fall_asleep(shared: Yard) -> None:
    for name, record in shared.store.records.items():
        shared.store.records[name] = msgspec.structs.replace(record, metadata={**record.metadata, "on_gpu": 400 * MIB})
    fleet = await shared.open()
    first = await fleet.ensure_ready("a")
    fleet.activity(first.id, 0, time.time() + 1)
    second = await fleet.ensure_ready("b")
    await use(shared, fleet, "a", 400)
    await use(shared, fleet, "b", 700)
    fleet.activity(second.id, 0, time.time() + 2)
    await reach(fleet, "a", "dozing")
    await use(shared, fleet, "a", 50)
    await reach(fleet, "a", "sleeping")
    assert [r.model for r in fleet.replicas()] == ["a", "b"]


async def test_who_was_promised_the_gpu_wakes_before_another_takes_it(shared: Yard) -> None:
    fleet = await shared.open()
    await asleep(shared, fleet, "a")
    await fleet.ensure_ready("b")
    (info,) = (r for r in fleet.replicas() if r.model == "b")
    fleet.activity(info.id, 0, time.time() + 1)
    engine_of(shared, fleet, "a").answers.clear()
    first = asyncio.create_task(fleet.ensure_ready("a", by_request=True))
    await use(shared, fleet, "b", 50)
    await reach(fleet, "b", "sleeping")
    second = asyncio.create_task(fleet.ensure_ready("b", by_request=True))
    await reach(fleet, "a", "loading")
    engine_of(shared, fleet, "a").answers.set()
    assert (await asyncio.wait_for(first, 10)).state == "ready"
    fleet.activity(first.result().id, 0, time.time() + 2)
    await reach(fleet, "a", "dozing")
    await use(shared, fleet, "a", 50)
    assert (await asyncio.wait_for(second, 10)).state == "ready"
    assert shared.process.starts == 2


async def test_a_sleeper_that_keeps_too_much_ends_after_all(shared: Yard) -> None:
    fleet = await shared.open()
    await fleet.ensure_ready("a")
    await swap(shared, fleet, "b", "a", 500)
    assert [(r.model, r.state) for r in fleet.replicas()] == [("b", "ready")]


async def test_nobody_sleeps_where_the_machines_own_memory_is_what_lacks(shared: Yard) -> None:
    shared.memory = Memory(662 * MIB, 662 * MIB)  # one fits
    fleet = await shared.open()
    first = await fleet.ensure_ready("a")
    fleet.activity(first.id, 0, time.time() + 1)
    await asyncio.wait_for(fleet.ensure_ready("b"), 10)
    assert [r.model for r in fleet.replicas()] == ["b"]


async def test_a_sleeper_whose_gpu_stays_taken_is_refused_and_ended(shared: Yard) -> None:
    fleet = await shared.open()
    await asleep(shared, fleet, "a")
    await fleet.ensure_ready("b", pin=True)
    with pytest.raises(OutOfMemory, match="'a' needs 550 MiB"):
        await asyncio.wait_for(fleet.ensure_ready("a", by_request=True), 10)
    await reach(fleet, "a", "failed")


async def test_the_next_daemon_knows_what_is_on_the_gpu(shared: Yard) -> None:
    fleet = await shared.open()
    await fleet.ensure_ready("a")
    for replica in fleet.all():
        await replica.detach()
    shared.supervisors.clear()
    later = await shared.open()
    assert [r.devices for r in later.replicas()] == [{GPU: 600 * MIB}]


async def test_how_many_requests_it_takes_there_is_what_its_plan_says_and_is_kept(shared: Yard) -> None:
    record = shared.store.records["a"]
    shared.store.records["a"] = msgspec.structs.replace(record, metadata={**record.metadata, "at_once": 64})
    fleet = await shared.open()
    assert (await fleet.ensure_ready("a")).parallel == 64
    for replica in fleet.all():
        await replica.detach()
    shared.supervisors.clear()
    assert [r.parallel for r in (await shared.open()).replicas()] == [64]


def test_a_replicas_share_is_that_of_all_its_processes() -> None:
    nobody = 1 << 22
    assert shares({"r": nobody}, {nobody: {GPU: 5}, nobody + 1: {GPU: 7}}) == {"r": {GPU: 5}}
    assert shares({"r": nobody}, {}) == {"r": {}}
