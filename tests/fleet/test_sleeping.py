"""Engines that can let go of their memory sleep when idle, and wake at the next request."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from pierhead.fleet.memory import Memory
from pierhead.fleet.supervisor import Supervisor

from .conftest import MIB, Yard


@pytest.fixture
def drowsy(yard: Yard) -> Yard:
    """Model ``a`` runs in an engine that can sleep, and is idle at once."""
    record = yard.store.records["a"]
    metadata = {**record.metadata, "sleep": ["/sleep?level=1", "/wake_up"]}
    yard.store.records["a"] = msgspec.structs.replace(record, metadata=metadata)
    return yard


def state(fleet: Supervisor) -> list[str]:
    return [r.state for r in fleet.replicas() if r.model == "a"]


async def reach(fleet: Supervisor, *wanted: str) -> None:
    async with asyncio.timeout(10):
        while state(fleet) != list(wanted):  # noqa: ASYNC110  # no event tells of every state
            await asyncio.sleep(0)


async def doze(fleet: Supervisor) -> Any:
    """Start it, have it used, and let it become idle."""
    info = await fleet.ensure_ready("a", keep_alive=0.05)
    fleet.activity(info.id, 0, time.time() + 0.01)
    await reach(fleet, "sleeping")
    return info


async def test_an_idle_model_sleeps_and_the_next_request_wakes_it(drowsy: Yard) -> None:
    fleet = await drowsy.open()
    info = await doze(fleet)
    engine = drowsy.engine(fleet)
    assert engine.asked[-1] == "POST /sleep?level=1"
    woken = await fleet.ensure_ready("a", by_request=True)
    assert (woken.id, woken.state) == (info.id, "ready")
    assert engine.asked[-2:] == ["POST /wake_up", "GET /health"]
    assert drowsy.process.starts == 1


async def test_what_a_sleeper_takes_is_read_and_counts_while_it_sleeps(drowsy: Yard) -> None:
    """Its weights may be in the machine's memory then; awake it is what it was awake."""
    fleet = await drowsy.open()
    info = await fleet.ensure_ready("a", keep_alive=0.05)
    (replica,) = fleet.all()
    engine = drowsy.engine(fleet)
    async with asyncio.timeout(10):
        engine.uses = (40 * MIB, 0)
        fleet.activity(info.id, 0, time.time() + 0.01)
        await reach(fleet, "dozing")
        replica.measure(40 * MIB, 40 * MIB)
        engine.uses = (90 * MIB, 0)
        while replica.claim().measured != 90 * MIB:  # noqa: ASYNC110  # no event tells of readings
            await asyncio.sleep(0)
        assert replica.state == "sleeping"
        await fleet.ensure_ready("a", by_request=True)
    assert replica.claim().measured == 40 * MIB


async def test_a_request_that_comes_while_it_falls_asleep_waits_and_wakes_it(drowsy: Yard) -> None:
    gate = asyncio.Event()

    async def withdrawn() -> None:
        await gate.wait()

    fleet = await drowsy.open(withdrawn=withdrawn)
    info = await fleet.ensure_ready("a", keep_alive=0.05)
    fleet.activity(info.id, 0, time.time() + 0.01)
    await reach(fleet, "dozing")
    asked = asyncio.create_task(fleet.ensure_ready("a", by_request=True))
    await asyncio.sleep(0)
    gate.set()
    assert (await asyncio.wait_for(asked, 10)).id == info.id
    assert drowsy.process.starts == 1


async def test_a_sleeper_is_evicted_for_another_model(drowsy: Yard) -> None:
    drowsy.memory = Memory(662 * MIB, 662 * MIB)  # one fits
    fleet = await drowsy.open()
    await doze(fleet)
    assert (await fleet.ensure_ready("b")).model == "b"
    await reach(fleet)


async def test_one_that_cannot_sleep_is_ended(drowsy: Yard) -> None:
    fleet = await drowsy.open()
    info = await fleet.ensure_ready("a", keep_alive=0.05)
    drowsy.engine(fleet).healthy = False
    fleet.activity(info.id, 0, time.time() + 0.01)
    await reach(fleet)


async def test_one_that_does_not_wake_is_started_again(drowsy: Yard) -> None:
    fleet = await drowsy.open()
    await doze(fleet)
    drowsy.engine(fleet).healthy = False
    woken = await asyncio.wait_for(fleet.ensure_ready("a", by_request=True), 20)
    assert woken.state == "ready"
    assert drowsy.process.starts == 2


async def test_stopping_a_sleeper_ends_it(drowsy: Yard) -> None:
    fleet = await drowsy.open()
    await doze(fleet)
    await fleet.stop_replica("a")
    assert state(fleet) == []


async def test_without_the_setting_idle_models_end(drowsy: Yard) -> None:
    drowsy.fleet_settings = msgspec.structs.replace(drowsy.fleet_settings, sleep=False)
    fleet = await drowsy.open()
    info = await fleet.ensure_ready("a", keep_alive=0.05)
    fleet.activity(info.id, 0, time.time() + 0.01)
    await reach(fleet)
    assert not any(line.startswith("POST") for e in drowsy.process.running.values() for line in e.asked)


async def left_asleep(drowsy: Yard) -> None:
    """The daemon is killed while the engine sleeps."""
    fleet = await drowsy.open()
    await doze(fleet)
    for replica in fleet.all():
        await replica.detach()
    drowsy.supervisors.clear()


async def test_a_sleeper_that_is_taken_over_is_woken_before_it_is_offered(drowsy: Yard) -> None:
    await left_asleep(drowsy)
    (engine,) = drowsy.process.running.values()
    engine.answers.clear()
    later = await drowsy.open()
    asked = asyncio.create_task(later.ensure_ready("a", by_request=True))
    async with asyncio.timeout(10):
        while engine.asked[-1] != "POST /wake_up":  # noqa: ASYNC110  # no event tells of what it hears
            await asyncio.sleep(0)
    assert (state(later), asked.done()) == (["loading"], False)
    engine.answers.set()
    assert (await asyncio.wait_for(asked, 10)).state == "ready"
    assert drowsy.engine(later).asked[-2:] == ["POST /wake_up", "GET /health"]
    assert drowsy.process.starts == 1


async def test_a_sleeper_that_is_taken_over_and_does_not_wake_is_started_again(drowsy: Yard) -> None:
    await left_asleep(drowsy)
    (engine,) = drowsy.process.running.values()
    engine.healthy = False
    later = await drowsy.open()
    assert (await asyncio.wait_for(later.ensure_ready("a", by_request=True), 20)).state == "ready"
    assert drowsy.process.starts == 2
