"""What the supervisor does with several replicas of one model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from pierhead.config import FleetSettings, ModelFleet
from pierhead.errors import EngineFailed, OutOfMemory, UsageError
from pierhead.events import Note
from pierhead.fleet.memory import Memory

if TYPE_CHECKING:
    from tests.fleet.conftest import Yard

    from pierhead.fleet.replica import Replica
    from pierhead.fleet.supervisor import Supervisor

MIB = 1 << 20


class Watch:
    """Hears of every change of a fleet."""

    def __init__(self) -> None:
        self.pulse = asyncio.Event()

    def __call__(self) -> None:
        self.pulse.set()

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not reached():
                self.pulse.clear()
                await self.pulse.wait()


async def opened(yard: Yard, **fleet: object) -> tuple[Supervisor, Watch]:
    if fleet:
        yard.fleet_settings = FleetSettings(backoff_initial=0.01, backoff_max=5.0, max_restarts=3, **fleet)  # type: ignore[arg-type]
    watch = Watch()
    return await yard.open(changed=watch), watch


def served(fleet: Supervisor, model: str) -> None:
    """Its replicas have had their first requests: from now on they may leave."""
    for replica in fleet.find(model):
        fleet.activity(replica.id, 0, replica.ready_at + 1)


def states(fleet: Supervisor, model: str = "a") -> list[str]:
    return [r.state for r in fleet.replicas() if r.model == model]


def ready(fleet: Supervisor, count: int, model: str = "a") -> Callable[[], bool]:
    return lambda: states(fleet, model) == ["ready"] * count


def named(fleet: Supervisor, name: str) -> Replica:
    (found,) = fleet.find(name)
    return found


async def reach(replica: Replica, state: str) -> None:
    assert await replica.until(lambda: replica.state == state, 5), f"{replica.state}, not {state}"


# --- starting -----------------------------------------------------------------------------------------------------


async def test_a_caller_has_its_answer_from_the_first_and_the_others_start_behind_it(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    info = await fleet.ensure_ready("a", replicas=3)
    assert info.state == "ready"
    assert len([s for s in states(fleet) if s == "ready"]) == 1
    await watch.until(ready(fleet, 3))
    assert yard.process.starts == 3
    assert {r.wanted for r in fleet.replicas()} == {3}
    assert len(yard.store.pins) == 3


async def test_callers_at_the_same_moment_start_no_more_than_is_kept(yard: Yard) -> None:
    fleet, watch = await opened(yard, replicas=2)
    await asyncio.gather(*(fleet.ensure_ready("a") for _ in range(30)))
    await watch.until(ready(fleet, 2))
    await asyncio.gather(*(fleet.ensure_ready("a") for _ in range(30)))
    assert yard.process.starts == 2


async def test_the_configuration_says_how_many_for_all_models_and_for_one(yard: Yard) -> None:
    fleet, watch = await opened(yard, replicas=2, models={"b": ModelFleet(replicas=1)})
    await fleet.ensure_ready("a")
    await fleet.ensure_ready("b")
    await watch.until(ready(fleet, 2))
    assert states(fleet, "b") == ["ready"]
    assert yard.process.starts == 3


@pytest.mark.parametrize("count", [0, -1, 65])
async def test_numbers_that_cannot_be_are_refused(yard: Yard, count: int) -> None:
    fleet, _ = await opened(yard)
    with pytest.raises(UsageError, match="cannot have"):
        await fleet.ensure_ready("a", replicas=count)
    assert fleet.all() == []


async def test_more_are_started_and_too_many_drained_the_least_used_first(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    first = await fleet.ensure_ready("a")
    await fleet.ensure_ready("a", replicas=3)
    await watch.until(ready(fleet, 3))
    busy, used, unused = (r.id for r in fleet.all())
    assert busy == first.id
    fleet.activity(busy, 1, named(fleet, busy).ready_at + 1)
    fleet.activity(used, 0, named(fleet, unused).ready_at + 2)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(ready(fleet, 2))
    assert [r.id for r in fleet.all()] == [busy, used]
    await fleet.ensure_ready("a", replicas=1)
    await watch.until(ready(fleet, 1))
    assert [r.id for r in fleet.all()] == [busy]
    assert set(yard.process.running) == {busy}
    assert await fleet.ensure_ready("a") == fleet.replicas()[0]
    fleet.activity(busy, 0, 0)


async def test_one_too_many_ends_its_requests_before_it_leaves(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(ready(fleet, 2))
    one, other = fleet.all()
    fleet.activity(one.id, 2, 0)
    fleet.activity(other.id, 1, 0)
    await fleet.ensure_ready("a", replicas=1)
    await reach(other, "draining")
    assert other.id in yard.process.running
    fleet.activity(other.id, 0, 0)
    await watch.until(ready(fleet, 1))
    fleet.activity(one.id, 0, 0)


async def test_all_replicas_have_the_settings_and_the_runtime_of_the_first(yard: Yard) -> None:
    yard.docker.available, yard.docker.prepared = True, False
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2, settings={"context": 512})
    await watch.until(ready(fleet, 2))  # by now the image is there, which another model would use
    assert [(r.context, r.runtime) for r in fleet.replicas()] == [(512, "process")] * 2
    assert (await fleet.ensure_ready("b")).runtime == "docker"


async def test_other_settings_restart_all_and_keep_the_number(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2, settings={"context": 512})
    await watch.until(ready(fleet, 2))
    before = {r.id for r in fleet.all()}
    info = await fleet.ensure_ready("a", settings={"context": 2048})
    assert info.context == 2048
    await watch.until(ready(fleet, 2))
    assert [r.context for r in fleet.replicas()] == [2048, 2048]
    assert not before & {r.id for r in fleet.all()}
    assert yard.process.starts == 4


# --- memory -------------------------------------------------------------------------------------------------------


async def test_where_memory_ends_it_serves_with_fewer_and_says_so(yard: Yard) -> None:
    yard.memory = Memory(762 * MIB, 762 * MIB)  # 250 MiB above the reserve: two fit
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=5)
    await watch.until(lambda: states(fleet) == ["ready", "ready", "failed"])
    assert fleet.replicas()[-1].error["code"] == "out_of_memory"
    assert (await fleet.ensure_ready("a", listener=yard.listener)).state == "ready"
    notes = [e for e in yard.events if isinstance(e, Note)]
    assert any("a runs 2 of 5 replicas" in n.message and n.level == "warning" for n in notes), notes


async def test_a_person_hears_at_once_that_a_second_one_does_not_fit(yard: Yard) -> None:
    yard.memory = Memory(662 * MIB, 662 * MIB)
    fleet, _ = await opened(yard)
    await fleet.ensure_ready("a", replicas=2, listener=yard.listener)
    assert any("a runs 1 of 2 replicas: a needs" in e.message for e in yard.events if isinstance(e, Note))


async def test_it_is_tried_again_when_memory_comes_free(yard: Yard) -> None:
    yard.memory = Memory(762 * MIB, 762 * MIB)
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("b")
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(lambda: states(fleet) == ["ready", "failed"])
    await fleet.stop_replica("b")
    await watch.until(ready(fleet, 2))


async def test_it_is_tried_again_when_the_next_one_asks(yard: Yard) -> None:
    yard.memory = Memory(662 * MIB, 662 * MIB)
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(lambda: states(fleet) == ["ready", "failed"])
    yard.memory = Memory(1 << 40, 1 << 40)
    await fleet.ensure_ready("a", by_request=True)
    await watch.until(ready(fleet, 2))


async def test_no_other_model_leaves_for_a_second_replica_and_a_first_one_takes_it_back(yard: Yard) -> None:
    yard.memory = Memory(762 * MIB, 762 * MIB)
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("b")
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(lambda: states(fleet) == ["ready", "failed"])
    assert states(fleet, "b") == ["ready"]  # idle, but alone
    await fleet.stop_replica("b")
    await watch.until(ready(fleet, 2))
    served(fleet, "a")
    await fleet.ensure_ready("c")
    await watch.until(lambda: states(fleet) == ["ready", "failed"])
    assert states(fleet, "c") == ["ready"]


async def test_a_model_that_is_evicted_as_a_whole_does_not_come_back_by_itself(yard: Yard) -> None:
    yard.memory = Memory(762 * MIB, 762 * MIB)
    yard.store.records["c"].metadata["needs"] = 250 * MIB  # type: ignore[index]
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(ready(fleet, 2))
    served(fleet, "a")
    await fleet.ensure_ready("c")
    assert states(fleet) == []
    fleet.activity(fleet.find("c")[0].id, 1, 0)
    with pytest.raises(OutOfMemory):
        await fleet.ensure_ready("a")
    fleet.activity(fleet.find("c")[0].id, 0, 0)


# --- crashes ------------------------------------------------------------------------------------------------------


async def test_one_that_crashes_comes_back_while_the_others_serve(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(ready(fleet, 2))
    one, other = fleet.all()
    yard.process.loads.clear()
    yard.process.running[one.id].end(signal=9)
    await reach(one, "starting")
    assert (await fleet.ensure_ready("a")).id == other.id
    yard.process.loads.set()
    await reach(one, "ready")
    assert [r.restarts for r in fleet.replicas()] == [1, 0]


async def test_only_the_one_that_somebody_saw_break_is_examined(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(ready(fleet, 2))
    one, other = fleet.all()
    for engine in yard.process.running.values():
        engine.healthy = False
    yard.process.loads.clear()
    assert (await fleet.ensure_ready("a", failed=one.id)).id == other.id
    assert [r.restarts for r in fleet.replicas()] == [1, 0] or one.state == "backoff"
    yard.process.loads.set()
    await reach(one, "ready")


async def test_a_model_has_failed_only_when_none_of_its_replicas_lives(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(ready(fleet, 2))
    one, other = fleet.all()
    yard.process.crashes = 100
    yard.process.running[one.id].end(code=3)
    await reach(one, "failed")
    assert (await fleet.ensure_ready("a", by_request=True)).id == other.id
    assert fleet.in_use(other.life.model.digest)
    yard.process.running[other.id].end(code=3)
    await reach(other, "failed")
    assert not fleet.in_use(other.life.model.digest)
    starts = yard.process.starts
    with pytest.raises(EngineFailed, match="3 times in vain"):
        await fleet.ensure_ready("a", by_request=True)
    assert yard.process.starts == starts
    yard.process.crashes = 0
    await fleet.ensure_ready("a", listener=yard.listener)
    await watch.until(ready(fleet, 2))


async def test_a_start_after_the_last_one_failed_does_not_wait_for_ever_for_one_that_drains(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(ready(fleet, 2))
    draining, failing = fleet.all()
    fleet.activity(draining.id, 1, 0)
    stop = asyncio.create_task(fleet.stop_replica(draining.id))
    await reach(draining, "draining")
    yard.process.crashes = 100
    yard.process.running[failing.id].end(code=3)
    await reach(failing, "failed")
    yard.process.crashes = 0
    caller = asyncio.create_task(fleet.ensure_ready("a", listener=yard.listener))
    await asyncio.sleep(0)
    fleet.activity(draining.id, 0, 0)
    async with asyncio.timeout(5):
        assert (await caller).state == "ready"
        await stop
    await watch.until(ready(fleet, 1))


async def test_a_person_who_asks_gets_a_new_one_for_the_one_that_failed(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a")
    yard.process.crashes = 1
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(lambda: states(fleet) == ["ready", "failed"])
    assert yard.process.starts == 2
    await fleet.ensure_ready("a", listener=yard.listener)
    await watch.until(ready(fleet, 2))


# --- idleness and ends --------------------------------------------------------------------------------------------


async def test_a_replica_that_balancing_passes_over_stays_while_its_model_is_used(
    yard: Yard,
) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2, keep_alive=0.05)
    await watch.until(ready(fleet, 2))
    one, other = fleet.all()
    fleet.activity(one.id, 1, other.ready_at + 0.01)
    assert [r.expires_at for r in fleet.replicas()] == [None, None]
    fleet.activity(one.id, 0, other.ready_at + 0.02)
    await watch.until(lambda: fleet.all() == [])
    assert yard.process.starts == 2
    assert yard.process.running == {}
    assert yard.store.pins == {}


async def test_the_name_of_a_model_stops_all_of_it(yard: Yard) -> None:
    fleet, watch = await opened(yard, replicas=3)
    await fleet.ensure_ready("a")
    await watch.until(ready(fleet, 3))
    assert len(await fleet.stop_replica("a")) == 3
    assert fleet.all() == []
    assert yard.process.starts == 3


async def test_one_that_is_stopped_by_its_id_is_not_started_again(yard: Yard) -> None:
    fleet, watch = await opened(yard, replicas=3)
    await fleet.ensure_ready("a")
    await watch.until(ready(fleet, 3))
    one, *others = fleet.all()
    model = one.life.model
    assert await fleet.stop_replica(one.id) == [one.id]
    assert fleet.kept(model) == 2
    assert fleet.all() == others
    await fleet.ensure_ready("a")
    assert yard.process.starts == 3
    for replica in others:
        await fleet.stop_replica(replica.id)
    assert fleet.kept(model) == 0
    assert fleet.all() == []
    assert yard.process.starts == 3


async def test_stopping_one_gives_its_memory_to_no_other_of_the_same_model(yard: Yard) -> None:
    yard.memory = Memory(762 * MIB, 762 * MIB)
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=3)
    await watch.until(lambda: states(fleet) == ["ready", "ready", "failed"])
    await fleet.stop_replica(fleet.all()[0].id)
    await watch.until(ready(fleet, 1))
    assert yard.process.starts == 2


async def test_a_model_is_stopped_while_its_second_replica_is_starting(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a")
    yard.process.loads.clear()
    await fleet.ensure_ready("a", replicas=3)
    await watch.until(lambda: states(fleet) == ["ready", "starting"])
    assert len(await fleet.stop_replica("a")) == 2
    assert fleet.all() == []
    assert not fleet.busy


async def test_a_request_for_a_model_that_is_ending_waits_and_starts_it_anew_as_configured(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(ready(fleet, 2))
    before = {r.id for r in fleet.all()}
    fleet.activity(fleet.all()[0].id, 1, 0)
    stop = asyncio.create_task(fleet.stop_replica("a"))
    await reach(fleet.all()[0], "draining")
    request = asyncio.create_task(fleet.ensure_ready("a"))
    await asyncio.sleep(0)
    fleet.activity(fleet.all()[0].id, 0, 0)
    await stop
    assert (await request).id not in before
    assert ready(fleet, 1)()


# --- the next daemon ----------------------------------------------------------------------------------------------


async def left(yard: Yard, fleet: Supervisor) -> None:
    """The daemon is killed: nothing more is done."""
    for replica in fleet.all():
        await replica.detach()
    yard.supervisors.clear()


async def test_the_next_daemon_goes_on_with_all_replicas_and_the_number_that_was_wanted(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2, keep_alive=77)
    await watch.until(ready(fleet, 2))
    await fleet.ensure_ready("a", replicas=3)
    await watch.until(ready(fleet, 3))
    kept = [r.id for r in fleet.all()]
    await left(yard, fleet)
    yard.process.running.pop(kept[1]).end()
    new, watch = await opened(yard)
    assert [r.id for r in new.all()][:2] == [kept[0], kept[2]]
    await watch.until(ready(new, 3))
    assert yard.process.starts == 4
    assert {r.wanted for r in new.replicas()} == {3}


async def test_of_records_that_differ_the_last_word_holds(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(ready(fleet, 2))
    one, other = fleet.all()
    old = (yard.folder / other.id / "record.json").read_bytes()
    await fleet.ensure_ready("a", replicas=3)
    await watch.until(ready(fleet, 3))
    (yard.folder / other.id / "record.json").write_bytes(old)  # killed between two of the writes
    await left(yard, fleet)
    new, watch = await opened(yard)
    assert {r.wanted for r in new.replicas()} == {3}
    assert ready(new, 3)()
    assert one.id in yard.process.running


async def test_what_is_too_much_after_a_kill_is_drained_by_the_next_daemon(yard: Yard) -> None:
    fleet, watch = await opened(yard)
    await fleet.ensure_ready("a", replicas=2)
    await watch.until(ready(fleet, 2))
    one, _ = fleet.all()
    fleet.activity(one.id, 1, 0)
    stop = asyncio.create_task(fleet.stop_replica(one.id))
    await reach(one, "draining")
    stop.cancel()
    await left(yard, fleet)
    new, watch = await opened(yard)
    await watch.until(ready(new, 1))
    assert yard.process.starts == 2
    fleet.activity(one.id, 0, 0)
