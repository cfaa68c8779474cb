"""What the supervisor does with starts, crashes, memory, idleness and what an earlier daemon left."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pierhead.config import FleetSettings
from pierhead.engines.base import Environment, Readiness
from pierhead.errors import EngineFailed, NotFound, OutOfMemory, PierError, RuntimeUnavailable, Timeout, UsageError
from pierhead.events import Note
from pierhead.fleet.memory import Memory

if TYPE_CHECKING:
    from tests.fleet.conftest import Yard

    from pierhead.fleet.replica import Replica
    from pierhead.fleet.supervisor import Supervisor

MIB = 1 << 20


def only(fleet: Supervisor) -> Replica:
    (replica,) = fleet.all()
    return replica


async def reach(replica: Replica, state: str) -> None:
    assert await replica.until(lambda: replica.state == state, 5), f"{replica.state}, not {state}"


# --- shared starts ------------------------------------------------------------------------------------------------


async def test_callers_at_the_same_moment_share_one_start(yard: Yard) -> None:
    fleet = await yard.open()
    infos = await asyncio.gather(*(fleet.ensure_ready("a") for _ in range(50)))
    assert yard.process.starts == 1
    assert len({i.id for i in infos}) == 1


async def test_a_caller_that_gives_up_does_not_end_the_start_of_others(yard: Yard) -> None:
    fleet = await yard.open()
    yard.process.loads.clear()
    first = asyncio.create_task(fleet.ensure_ready("a"))
    second = asyncio.create_task(fleet.ensure_ready("a"))
    await asyncio.sleep(0)
    await reach(only(fleet), "starting")
    first.cancel()
    yard.process.loads.set()
    assert (await second).state == "ready"


async def test_a_start_that_all_callers_left_still_ends_well(yard: Yard) -> None:
    fleet = await yard.open()
    yard.process.loads.clear()
    caller = asyncio.create_task(fleet.ensure_ready("a"))
    await asyncio.sleep(0)
    await reach(only(fleet), "starting")
    caller.cancel()
    yard.process.loads.set()
    await reach(only(fleet), "ready")


async def test_an_engine_that_ends_while_loading_fails_at_once_with_its_last_lines(yard: Yard) -> None:
    fleet = await yard.open()
    yard.process.crashes = 1
    with pytest.raises(EngineFailed, match="it is broken") as caught:
        await fleet.ensure_ready("a")
    assert caught.value.data["log"][-1] == "engine: it is broken"
    assert yard.process.starts == 1
    assert only(fleet).state == "failed"
    assert yard.store.pins == {}
    assert (await fleet.ensure_ready("a")).state == "ready"
    assert len(fleet.all()) == 1


async def test_an_engine_that_never_answers_runs_into_the_deadline(yard: Yard) -> None:
    yard.fleet_settings = FleetSettings(start_timeout=0.05)
    fleet = await yard.open()
    original = yard.process.start

    async def sick(spec):
        engine = await original(spec)
        engine.healthy = False
        return engine

    yard.process.start = sick
    with pytest.raises(Timeout, match=r"0\.05 s"):
        await fleet.ensure_ready("a")
    assert yard.process.running == {}


async def test_an_engine_may_take_as_long_as_it_says_unless_the_user_says_how_long(yard: Yard) -> None:
    fleet = await yard.open()
    original = yard.process.start

    async def sick(spec):
        engine = await original(spec)
        engine.healthy = False
        return engine

    yard.process.start = sick
    yard.planner.said = {"readiness": Readiness(timeout=0.05)}
    with pytest.raises(Timeout, match=r"0\.05 s"):
        await fleet.ensure_ready("a")


async def test_an_engine_that_is_to_use_a_gpu_never_runs_as_a_process_without_it(yard: Yard) -> None:
    fleet = await yard.open()
    yard.planner.said = {"devices": ("nvidia.com/gpu=all",)}
    for runtime in (None, "process"):
        with pytest.raises(RuntimeUnavailable, match=r"nvidia\.com/gpu=all"):
            await fleet.ensure_ready("a", runtime=runtime)
    assert yard.process.starts == 0


async def test_a_machine_without_a_gpu_is_told_so_before_anything_is_installed(yard: Yard) -> None:
    fleet = await yard.open()
    yard.planner.said = {"devices": ("nvidia.com/gpu=all",), "environment": Environment(("wheels==1",))}
    for runtime in (None, "process"):
        with pytest.raises(RuntimeUnavailable, match="this machine has no NVIDIA GPU"):
            await fleet.ensure_ready("a", runtime=runtime)
    assert yard.process.prepares == 0


@pytest.mark.parametrize("why", ["memory", "settings", "gpu", "beside"])
async def test_what_runs_stays_when_other_settings_cannot_work(yard: Yard, why: str) -> None:
    fleet = await yard.open()
    before = await fleet.ensure_ready("a")
    fleet.activity(before.id, 1, time.time())
    settings: dict[str, Any] = {"context": 2048}
    if why == "memory":
        yard.memory = Memory(600 << 20, 600 << 20)  # 88 MiB above the reserve
    elif why == "gpu":
        yard.planner.said = {"devices": ("nvidia.com/gpu=all",)}
    elif why == "beside":
        yard.planner.facts = msgspec.structs.replace(yard.planner.facts, speculative=True)
        settings["draft"] = "nobody"
    else:
        settings["engine"] = "moon"
    with pytest.raises((OutOfMemory, RuntimeUnavailable, UsageError, NotFound)):
        await asyncio.wait_for(fleet.ensure_ready("a", settings=settings), 10)
    assert [(r.id, r.state) for r in fleet.replicas()] == [(before.id, "ready")]
    assert set(yard.store.pins) == {before.id}
    fleet.activity(before.id, 0, time.time())


async def test_unknown_models_and_runtimes_are_refused(yard: Yard) -> None:
    fleet = await yard.open()
    with pytest.raises(NotFound):
        await fleet.ensure_ready("z")
    with pytest.raises(UsageError, match="no runtime 'moon'"):
        await fleet.ensure_ready("a", runtime="moon")
    with pytest.raises(RuntimeUnavailable, match="switched off"):
        await fleet.ensure_ready("a", runtime="docker")


# --- crashes ------------------------------------------------------------------------------------------------------


async def test_a_crash_is_noticed_by_the_exit_and_the_replica_comes_back(yard: Yard) -> None:
    fleet = await yard.open()
    before = await fleet.ensure_ready("a")
    yard.engine(fleet).end(signal=11)
    await reach(only(fleet), "backoff")
    after = await fleet.ensure_ready("a")
    assert (after.id, after.restarts) == (before.id, 1)


async def test_a_crash_loop_ends_in_failed_with_the_reason_and_a_person_can_start_it_anew(yard: Yard) -> None:
    fleet = await yard.open()
    await fleet.ensure_ready("a")
    yard.process.crashes = 100
    yard.engine(fleet).end(code=3)
    await reach(only(fleet), "failed")
    assert yard.process.starts == 1 + 3
    with pytest.raises(EngineFailed, match="3 times in vain") as caught:
        await fleet.ensure_ready("a")
    assert caught.value.data["log"]
    assert yard.process.starts == 1 + 3
    yard.process.crashes = 0
    assert (await fleet.ensure_ready("a", listener=yard.listener)).state == "ready"


async def test_a_replica_that_somebody_saw_break_is_examined(yard: Yard) -> None:
    fleet = await yard.open()
    info = await fleet.ensure_ready("a")
    assert (await fleet.ensure_ready("a", failed=info.id)).restarts == 0
    yard.engine(fleet).healthy = False
    assert (await fleet.ensure_ready("a", failed=info.id)).restarts == 1


# --- settings and runtimes ----------------------------------------------------------------------------------------


async def test_other_settings_restart_and_none_at_all_join(yard: Yard) -> None:
    fleet = await yard.open()
    first = await fleet.ensure_ready("a", settings={"context": 512})
    assert (await fleet.ensure_ready("a")).id == first.id
    assert (await fleet.ensure_ready("a", settings={"context": 512})).id == first.id
    second = await fleet.ensure_ready("a", settings={"context": 2048}, listener=yard.listener)
    assert second.id != first.id
    assert second.context == 2048
    assert any("other settings (context)" in e.message for e in yard.events if isinstance(e, Note))
    assert len(yard.process.running) == 1


async def test_auto_takes_docker_when_its_image_is_there(yard: Yard) -> None:
    yard.docker.available = True
    fleet = await yard.open()
    assert (await fleet.ensure_ready("a")).runtime == "docker"


async def test_auto_answers_from_a_process_while_the_image_is_built_and_says_so(yard: Yard) -> None:
    yard.docker.available, yard.docker.prepared = True, False
    yard.docker.prepare_gate.clear()
    fleet = await yard.open()
    infos = [await fleet.ensure_ready(m, listener=yard.listener) for m in "ab"]
    assert [i.runtime for i in infos] == ["process", "process"]
    assert any("image is built" in e.message for e in yard.events if isinstance(e, Note))
    assert fleet.busy
    yard.docker.prepare_gate.set()
    (build,) = fleet.chooser.builds
    await build
    assert yard.docker.prepares == 1
    assert (await fleet.ensure_ready("c")).runtime == "docker"


async def test_auto_answers_from_a_process_when_docker_cannot_start_containers_and_says_why(yard: Yard) -> None:
    yard.docker.available, yard.docker.refuses = True, "the Engine said no"
    fleet = await yard.open()
    info = await fleet.ensure_ready("a", listener=yard.listener)
    assert (info.runtime, info.state) == ("process", "ready")
    assert any("the Engine said no" in e.message for e in yard.events if isinstance(e, Note))
    yard.docker.refuses = ""
    assert (await fleet.ensure_ready("b")).runtime == "docker"


async def test_auto_waits_for_an_image_that_is_all_there_is_of_an_engine(yard: Yard) -> None:
    yard.planner = type(yard.planner)(recipe=False, image="somebody/server:1")
    yard.docker.available, yard.docker.prepared = True, False
    fleet = await yard.open()
    assert (await fleet.ensure_ready("a")).runtime == "docker"
    yard.docker.available = False
    with pytest.raises(PierError, match="is the image somebody/server:1, and no Docker Engine answers"):
        await fleet.ensure_ready("b")
    assert not yard.process.starts


async def test_auto_builds_nothing_for_an_engine_that_has_no_image(yard: Yard) -> None:
    yard.planner = type(yard.planner)(recipe=False)
    yard.docker.available = True
    fleet = await yard.open()
    info = await fleet.ensure_ready("a", listener=yard.listener)
    assert info.runtime == "process"
    assert not any("image" in e.message for e in yard.events if isinstance(e, Note))


async def test_a_runtime_that_was_named_is_not_replaced_when_it_cannot_start(yard: Yard) -> None:
    yard.docker.available, yard.docker.refuses = True, "the Engine said no"
    fleet = await yard.open()
    with pytest.raises(PierError, match="the Engine said no"):
        await fleet.ensure_ready("a", runtime="docker")
    assert not yard.process.starts
    yard.process.refuses = "no room"
    with pytest.raises(PierError, match="no room"):
        await fleet.ensure_ready("b")
    assert yard.process.starts == 1


# --- memory -------------------------------------------------------------------------------------------------------


async def test_the_longest_idle_model_makes_room(yard: Yard) -> None:
    yard.memory = Memory(812 * MIB, 812 * MIB)  # 300 MiB above the reserve
    fleet = await yard.open()
    for name in "abc":
        await fleet.ensure_ready(name)
    for at, name in enumerate("bca"):
        fleet.activity(fleet.find(name)[0].id, 0, fleet.find(name)[0].ready_at + 1 + at)
    await fleet.ensure_ready("d", listener=yard.listener)
    assert sorted(r.model for r in fleet.replicas()) == ["a", "c", "d"]
    assert any("stopping b" in e.message for e in yard.events if isinstance(e, Note))


async def test_busy_and_pinned_models_stay_and_the_refusal_has_numbers(yard: Yard) -> None:
    yard.memory = Memory(712 * MIB, 712 * MIB)
    fleet = await yard.open()
    await fleet.ensure_ready("a", pin=True)
    busy = await fleet.ensure_ready("b")
    fleet.activity(busy.id, 1, 0)
    with pytest.raises(OutOfMemory) as caught:
        await fleet.ensure_ready("c")
    assert {h["model"] for h in caught.value.data["holders"]} == {"a", "b"}
    assert sorted(r.model for r in fleet.replicas() if r.state == "ready") == ["a", "b"]
    fleet.activity(busy.id, 0, 0)


async def test_two_starts_at_once_do_not_promise_the_same_memory_twice(yard: Yard) -> None:
    yard.memory = Memory(662 * MIB, 662 * MIB)  # 150 MiB above the reserve: one fits
    fleet = await yard.open()
    yard.process.loads.clear()
    starts = [asyncio.create_task(fleet.ensure_ready(m)) for m in "ab"]
    done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED, timeout=5)
    assert isinstance(done.pop().exception(), OutOfMemory)
    yard.process.loads.set()
    results = await asyncio.gather(*starts, return_exceptions=True)
    assert sorted(isinstance(r, OutOfMemory) for r in results) == [False, True]


# --- idleness and ends --------------------------------------------------------------------------------------------


async def test_an_idle_model_leaves_and_a_busy_one_does_not(yard: Yard) -> None:
    fleet = await yard.open()
    info = await fleet.ensure_ready("a", keep_alive=0.05)
    replica = only(fleet)
    fleet.activity(info.id, 1, replica.ready_at + 0.01)
    assert fleet.info(replica).expires_at is None
    fleet.activity(info.id, 0, replica.ready_at + 0.02)
    await reach(replica, "stopped")
    assert fleet.all() == []
    assert yard.store.pins == {}
    assert not fleet.busy


async def test_a_negative_keep_alive_and_a_pin_keep_a_model_for_ever(yard: Yard) -> None:
    fleet = await yard.open()
    await fleet.ensure_ready("a", keep_alive=-1)
    assert fleet.info(only(fleet)).expires_at is None
    await fleet.ensure_ready("a", keep_alive=60)
    assert fleet.info(only(fleet)).expires_at is not None
    await fleet.ensure_ready("a", pin=True)
    assert fleet.info(only(fleet)).expires_at is None


async def test_a_stop_withdraws_the_route_first_then_waits_for_open_requests(yard: Yard) -> None:
    order: list[str] = []
    changed: list[str] = []

    async def withdrawn() -> None:
        assert only(fleet).state == "draining"
        order.append("withdrawn")

    fleet = await yard.open(withdrawn=withdrawn, changed=lambda: changed.append("x"))
    info = await fleet.ensure_ready("a")
    fleet.activity(info.id, 1, 0)
    stop = asyncio.create_task(fleet.stop_replica("a"))
    await reach(only(fleet), "draining")
    assert info.id in yard.process.running
    fleet.activity(info.id, 0, 0)
    assert await stop == [info.id]
    assert order == ["withdrawn"]
    assert yard.process.running == {}


async def test_a_drain_ends_after_its_time(yard: Yard) -> None:
    fleet = await yard.open()
    info = await fleet.ensure_ready("a")
    fleet.activity(info.id, 1, 0)
    assert await fleet.stop_replica(info.id, timeout=0.05) == [info.id]


async def test_a_model_is_stopped_in_any_state(yard: Yard) -> None:
    fleet = await yard.open()
    yard.process.loads.clear()
    caller = asyncio.create_task(fleet.ensure_ready("a"))
    await asyncio.sleep(0)
    await reach(only(fleet), "starting")
    await fleet.stop_replica("a")
    with pytest.raises(EngineFailed, match="stopped while it was starting"):
        await caller
    assert fleet.all() == []
    with pytest.raises(NotFound):
        await fleet.stop_replica("a")


# --- the next daemon ----------------------------------------------------------------------------------------------


async def test_the_next_daemon_adopts_what_is_ready_and_ends_the_rest(yard: Yard) -> None:
    old = await yard.open()
    kept = await old.ensure_ready("a", settings={"context": 512}, keep_alive=77, pin=True)
    removed = await old.ensure_ready("b")
    half = await old.ensure_ready("c")
    for replica in old.all():
        await replica.detach()
    yard.supervisors.clear()
    del yard.store.records["b"]
    (yard.folder / half.id / "record.json").unlink()
    yard.store.pin("sha256:" + "d" * 64, "rgone")
    new = await yard.open()
    (info,) = new.replicas()
    assert (info.id, info.context, info.pinned, info.started) == (kept.id, 512, True, kept.started)
    assert set(yard.process.running) == {kept.id}
    assert removed.id not in yard.store.pins
    assert set(yard.store.pins) == {kept.id}
    assert (await new.ensure_ready("a")).id == kept.id
    assert yard.process.starts == 3


async def test_a_replica_that_ended_while_no_daemon_looked_is_cleaned_up(yard: Yard) -> None:
    old = await yard.open()
    await old.ensure_ready("a")
    engine = yard.engine(old)
    await only(old).detach()
    yard.supervisors.clear()
    engine.end()
    new = await yard.open()
    assert new.all() == []
    assert yard.process.running == {}


async def test_requests_wait_for_adoption(yard: Yard) -> None:
    old = await yard.open()
    first = await old.ensure_ready("a")
    await only(old).detach()
    yard.supervisors.clear()
    gate = asyncio.Event()
    original = yard.process.list

    async def slow() -> list[str]:
        await gate.wait()
        return await original()

    yard.process.list = slow
    opening = asyncio.create_task(yard.open())
    await asyncio.sleep(0)
    caller = asyncio.create_task(yard.supervisors[0].ensure_ready("a"))
    await asyncio.sleep(0)
    gate.set()
    await opening
    assert (await caller).id == first.id


async def test_a_handover_waits_for_what_is_starting_and_leaves_it_running(yard: Yard) -> None:
    fleet = await yard.open()
    yard.process.loads.clear()
    caller = asyncio.create_task(fleet.ensure_ready("a"))
    await asyncio.sleep(0)
    await reach(only(fleet), "starting")
    closing = asyncio.create_task(fleet.close(drain=False))
    await asyncio.sleep(0)
    yard.process.loads.set()
    info = await caller
    await closing
    assert set(yard.process.running) == {info.id}
    yard.supervisors.clear()
    assert (await (await yard.open()).ensure_ready("a")).id == info.id
