"""Who gets memory and who leaves for it; and how much there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.engines.gpus import Device, take
from pierhead.errors import OutOfMemory, UsageError
from pierhead.fleet.memory import Memory, limited, parse_size, read_memory
from pierhead.fleet.scheduler import (
    DEVICE_RESERVE,
    Claim,
    Decision,
    Machine,
    Room,
    Wait,
    decide,
    free_memory,
    free_room,
    overdrawn,
)
from pierhead.fleet.state import State

GIB = 1 << 30
MIB = 1 << 20


def needs(size: int):
    """A plan that needs ``size`` bytes."""

    def plan(room: Room) -> int:
        if room.memory < size:
            raise OutOfMemory(f"needs {size}, {room.memory} free", data={"needed": size, "free": room.memory})
        return size

    return plan


claims = st.lists(
    st.builds(
        Claim,
        replica=st.uuids().map(lambda u: u.hex[:12]),
        model=st.just("m"),
        memory=st.integers(0, 8 * GIB),
        state=st.sampled_from(list(State)),
        open=st.integers(0, 2),
        pinned=st.booleans(),
        last_used=st.floats(0, 1e9),
    ),
    max_size=8,
    unique_by=lambda c: c.replica,
)


@given(claims, st.integers(0, 16 * GIB), st.integers(0, 16 * GIB), st.integers(0, GIB), st.integers(0, 16 * GIB))
def test_eviction_takes_the_longest_unused_and_never_what_is_pinned_or_busy(
    held: list[Claim], total: int, available: int, reserve: int, need: int
) -> None:
    memory = Memory(total, min(total, available))
    idle = sorted((c for c in held if c.evictable), key=lambda c: (c.last_used, c.replica))
    try:
        decision = decide(held, Machine(memory), reserve, needs(need))
    except OutOfMemory:
        assert need > free_memory(memory, held, reserve)
        return
    if isinstance(decision, Wait):
        assert need > free_memory(memory, held, reserve)
        assert any(not c.pinned and not c.evictable for c in held)  # for somebody, and not for ever
        return
    assert decision.evict == tuple(c.replica for c in idle[: len(decision.evict)])
    if need <= free_memory(memory, held, reserve):
        assert decision.evict == ()
    assert all(not c.pinned and not c.open for c in held if c.replica in decision.evict)


@given(claims, st.integers(0, 16 * GIB), st.integers(0, GIB), st.integers(0, 16 * GIB))
def test_all_that_stays_and_what_is_planned_never_exceed_the_budget(
    held: list[Claim], total: int, reserve: int, need: int
) -> None:
    try:
        decision = decide(held, Machine(Memory(total, total)), reserve, needs(need))
    except OutOfMemory:
        return
    if isinstance(decision, Decision):
        gone = (State.STOPPED, State.FAILED, State.DRAINING, State.STOPPING)
        stay = sum(c.memory for c in held if c.state not in gone and c.replica not in decision.evict)
        assert stay + need + reserve <= total or not need


@given(claims, st.integers(0, 16 * GIB), st.integers(0, GIB))
def test_an_overdrawn_ledger_is_mended_by_the_longest_unused(held: list[Claim], total: int, reserve: int) -> None:
    leave = overdrawn(held, Machine(Memory(total, total)), reserve)
    idle = sorted((c for c in held if c.evictable), key=lambda c: (c.last_used, c.replica))
    assert leave == tuple(c.replica for c in idle[: len(leave)])
    gone = (State.STOPPED, State.FAILED, State.DRAINING, State.STOPPING)
    rest = sum(c.memory for c in held if c.state not in gone and c.replica not in leave)
    assert rest + reserve <= total or len(leave) == len(idle)


def test_a_model_that_fits_evicts_nobody() -> None:
    held = [Claim("a", "a", GIB, State.READY)]
    assert decide(held, Machine(Memory(8 * GIB, 6 * GIB)), 0, needs(GIB)) == Decision(GIB)


def test_as_few_idle_models_leave_as_make_room() -> None:
    held = [Claim(str(n), f"m{n}", 2 * GIB, State.READY, last_used=n) for n in range(3)]
    assert decide(held, Machine(Memory(8 * GIB, 2 * GIB)), 0, needs(3 * GIB)) == Decision(3 * GIB, ("0",))
    assert decide(held, Machine(Memory(8 * GIB, 2 * GIB)), 0, needs(5 * GIB)) == Decision(5 * GIB, ("0", "1"))


def test_it_waits_for_the_busy_and_the_just_started_but_not_for_the_pinned() -> None:
    held = [Claim("a", "gemma", 2 * GIB, State.READY, open=1), Claim("b", "qwen", GIB, State.LOADING)]
    outcome = decide(held, Machine(Memory(4 * GIB, 4 * GIB)), 0, needs(3 * GIB))
    assert isinstance(outcome, Wait)
    assert "gemma (busy), qwen (loading)" in (outcome.why.hint or "")
    fresh = [Claim("a", "gemma", 2 * GIB, State.READY, settled=False)]
    assert isinstance(decide(fresh, Machine(Memory(4 * GIB, 4 * GIB)), 0, needs(3 * GIB)), Wait)
    with pytest.raises(OutOfMemory):
        decide(
            [Claim("a", "gemma", 2 * GIB, State.READY, pinned=True)], Machine(Memory(3 * GIB, GIB)), 0, needs(2 * GIB)
        )


def test_what_is_leaving_counts_as_gone_when_others_are_chosen() -> None:
    held = [Claim("a", "a", 2 * GIB, State.DRAINING, open=1), Claim("b", "b", GIB, State.READY)]
    assert decide(held, Machine(Memory(4 * GIB, GIB)), 0, needs(3 * GIB)) == Decision(3 * GIB)
    assert free_memory(Memory(4 * GIB, GIB), held, 0) == GIB  # but it is not gone yet


def test_less_is_tried_only_where_all_would_never_fit_and_after_all_have_left() -> None:
    held = [Claim("a", "a", 2 * GIB, State.READY), Claim("b", "b", GIB, State.READY, pinned=True)]
    machine = Memory(4 * GIB, GIB)
    assert decide(held, Machine(machine), 0, needs(4 * GIB), smaller=lambda room: room.memory) == Decision(
        3 * GIB, ("a",)
    )
    with pytest.raises(OutOfMemory):
        decide(held, Machine(machine), 0, needs(4 * GIB))


def test_memory_that_is_measured_tells_what_other_programs_use() -> None:
    held = [Claim("a", "a", 3 * GIB, State.READY, measured=GIB)]  # 2 GiB of mapped weights, which count as available
    assert free_memory(Memory(8 * GIB, 7 * GIB), held, 0) == 5 * GIB
    assert free_memory(Memory(8 * GIB, 4 * GIB), held, 0) == 2 * GIB  # others use 3 GiB


def test_a_model_that_has_just_become_ready_frees_nothing_until_it_is_read() -> None:
    machine = Memory(16 * GIB, 10 * GIB)  # others use 6 GiB
    loading = Claim("a", "a", 8 * GIB, State.LOADING, weights=7 * GIB)
    assert free_memory(machine, [loading], 0) == 2 * GIB
    machine = Memory(16 * GIB, 9 * GIB)  # its anonymous GiB is taken; the weights are mapped
    ready = Claim("a", "a", 8 * GIB, State.READY, weights=7 * GIB)
    assert free_memory(machine, [ready], 0) == 2 * GIB
    assert free_memory(machine, [replace(ready, measured=GIB)], 0) == 2 * GIB
    assert decide([ready], Machine(Memory(16 * GIB, 4 * GIB)), 0, needs(12 * GIB)) == Decision(
        12 * GIB, ("a",)
    )  # maybe unmapped


GPUS = tuple(
    Device(name=f"nvidia.com/gpu={n}", title="GPU", total=size * GIB, free=size * GIB) for n, size in enumerate((9, 25))
)


def on_gpu(size: int, count: int = 1):
    """A plan that needs ``size`` bytes of a GPU, and nothing else."""

    def plan(room: Room) -> tuple[str, ...]:
        return tuple(take("m", room.devices, size, count=count))

    return plan


def held_on(name: str, gpu: int, size: int, **more: Any) -> Claim:
    return Claim(name, name, GIB, more.pop("state", State.READY), devices={f"nvidia.com/gpu={gpu}": size}, **more)


def test_each_accelerator_has_a_ledger_of_its_own() -> None:
    machine = Machine(Memory(8 * GIB, 8 * GIB), GPUS)
    busy, idle = held_on("a", 1, 20 * GIB, open=1), held_on("a", 1, 20 * GIB)
    assert decide([busy], machine, 0, on_gpu(6 * GIB)) == Decision(("nvidia.com/gpu=0",))
    assert decide([idle], machine, 0, on_gpu(12 * GIB)) == Decision(("nvidia.com/gpu=1",), ("a",))
    assert isinstance(decide([busy], machine, 0, on_gpu(12 * GIB)), Wait)
    with pytest.raises(OutOfMemory) as caught:
        decide([held_on("a", 1, 20 * GIB, pinned=True)], machine, 0, on_gpu(30 * GIB))
    assert "a (pinned)" in (caught.value.hint or "")
    assert caught.value.data["device"] == "nvidia.com/gpu=0"  # which has the most free


def test_only_who_holds_an_accelerators_memory_leaves_for_it() -> None:
    machine = Machine(Memory(8 * GIB, 8 * GIB), GPUS[:1])
    held = [Claim("old", "old", GIB, State.READY), held_on("new", 0, 6 * GIB, last_used=5.0)]
    assert decide(held, machine, 0, on_gpu(6 * GIB)) == Decision(("nvidia.com/gpu=0",), ("new",))
    with pytest.raises(OutOfMemory):
        decide(held[:1], machine, 0, on_gpu(9 * GIB))


def test_who_would_leave_another_accelerator_for_nothing_stays() -> None:
    machine = Machine(Memory(8 * GIB, 8 * GIB), GPUS)
    held = [held_on("small", 0, 5 * GIB), held_on("large", 1, 24 * GIB, last_used=5.0)]
    assert decide(held, machine, 0, on_gpu(12 * GIB)) == Decision(("nvidia.com/gpu=1",), ("large",))
    assert decide(held, machine, 0, on_gpu(8 * GIB, count=2)).evict == ("small", "large")  # type: ignore[union-attr]


def test_what_others_use_of_an_accelerator_is_not_free_and_what_a_replica_gives_back_is() -> None:
    half = Machine(Memory(8 * GIB, 8 * GIB), (msgspec.structs.replace(GPUS[1], free=10 * GIB),))
    read = held_on("a", 1, 8 * GIB, read={"nvidia.com/gpu=1": 6 * GIB})
    assert free_room(half, [read], 0).devices[0].free == 8 * GIB - DEVICE_RESERVE
    assert free_room(half, [], 0, [read]).devices[0].free == 16 * GIB - DEVICE_RESERVE
    asleep = held_on("a", 1, GIB, state=State.SLEEPING, read={"nvidia.com/gpu=1": GIB})
    assert free_room(half, [asleep], 0).devices[0].free == 10 * GIB - DEVICE_RESERVE


def test_an_overdrawn_accelerator_is_mended_by_who_is_on_it() -> None:
    machine = Machine(Memory(8 * GIB, 8 * GIB), GPUS)
    held = [held_on("a", 0, 5 * GIB), held_on("b", 0, 5 * GIB, last_used=1.0), held_on("c", 1, 5 * GIB)]
    assert overdrawn(held, machine, 0) == ("a",)


@pytest.mark.parametrize(
    ("text", "size"), [(5, 5), ("5", 5), ("3GiB", 3 * GIB), ("3 gb", 3 * GIB), ("1.5G", 3 * GIB // 2), ("2m", 2 << 20)]
)
def test_a_budget_is_written_as_people_write_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


def test_a_budget_bounds_the_machine_and_no_size_is_refused() -> None:
    assert limited(Memory(8 * GIB, 5 * GIB), 3 * GIB) == Memory(3 * GIB, 5 * GIB, "[fleet] memory_budget")
    assert (
        limited(Memory(8 * GIB, 5 * GIB), 0) == limited(Memory(8 * GIB, 5 * GIB), 9 * GIB) == Memory(8 * GIB, 5 * GIB)
    )
    with pytest.raises(UsageError, match="much"):
        parse_size("much")


def test_the_refusal_names_the_numbers_and_who_holds_memory() -> None:
    held = [
        Claim("a", "gemma", 2 * GIB, State.READY, open=1),
        Claim("b", "qwen", GIB, State.READY, pinned=True),
    ]
    with pytest.raises(OutOfMemory) as caught:
        decide(held, Machine(Memory(4 * GIB, GIB)), 0, needs(4 * GIB))
    assert "gemma (busy), qwen (pinned)" in (caught.value.hint or "")
    assert [h["replica"] for h in caught.value.data["holders"]] == ["a", "b"]


def test_a_refusal_within_a_budget_names_it_and_its_reserve_and_sends_nobody_to_stop_what_would_not_help() -> None:
    held = [Claim("a", "gemma", 100 * MIB, State.READY, open=1)]
    machine = Machine(limited(Memory(8 * GIB, 8 * GIB), 700 * MIB))
    with pytest.raises(OutOfMemory) as never:
        decide(held, machine, 512 * MIB, needs(500 * MIB))
    assert "of the budget of 700 MiB, of which 512 MiB stay in reserve" in never.value.message
    assert never.value.hint == "Raise [fleet] memory_budget, lower [engine] memory_reserve, or use a smaller model."
    found = decide(held, machine, 512 * MIB, needs(150 * MIB))
    assert isinstance(found, Wait)
    assert "gemma (busy)" in (found.why.hint or "")


def test_memory_that_a_loading_model_has_not_touched_yet_is_not_free() -> None:
    loading = [Claim("a", "a", 3 * GIB, State.LOADING)]
    assert free_memory(Memory(8 * GIB, 8 * GIB), loading, GIB) == 4 * GIB


def test_mapped_weights_count_though_the_kernel_calls_them_available() -> None:
    ready = [Claim("a", "a", 6 * GIB, State.READY)]
    assert free_memory(Memory(8 * GIB, 7 * GIB), ready, 0) == 2 * GIB


def _proc(root: Path, cgroup: str) -> Path:
    (root / "self").mkdir(parents=True)
    (root / "meminfo").write_text("MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n")
    (root / "self" / "cgroup").write_text(cgroup)
    return root


def test_without_control_groups_the_machine_sets_the_bound(tmp_path: Path) -> None:
    assert read_memory(_proc(tmp_path / "p", ""), tmp_path / "none") == Memory(8 * GIB, 4 * GIB)


def test_a_version_2_limit_of_any_parent_group_binds(tmp_path: Path) -> None:
    group = tmp_path / "cg" / "a" / "b"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1\n")
    (group.parent / "memory.max").write_text(str(2 * GIB))
    (group.parent / "memory.current").write_text(str(GIB))
    (group.parent / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 2}\n")
    found = read_memory(_proc(tmp_path / "p", "0::/a/b\n"), tmp_path / "cg")
    assert (found.total, found.available) == (2 * GIB, 2 * GIB - GIB // 2)
    assert str(group.parent) in found.bound


def test_a_version_1_limit_binds_and_unlimited_does_not(tmp_path: Path) -> None:
    root = tmp_path / "cg" / "memory"
    (root / "a").mkdir(parents=True)
    (root / "memory.limit_in_bytes").write_text("9223372036854771712")
    (root / "memory.usage_in_bytes").write_text("1")
    (root / "a" / "memory.limit_in_bytes").write_text(str(GIB))
    (root / "a" / "memory.usage_in_bytes").write_text(str(GIB // 4))
    (root / "a" / "memory.stat").write_text("total_inactive_file 0\n")
    found = read_memory(_proc(tmp_path / "p", "7:memory:/a\n0::/\n"), tmp_path / "cg")
    assert (found.total, found.available) == (GIB, GIB - GIB // 4)


@pytest.mark.parametrize(
    ("names", "stat"),
    [
        (("memory.max", "memory.current"), "inactive_file {0}\nactive_file {1}\nfile_dirty {2}\n"),
        (
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "total_inactive_file {0}\ntotal_active_file {1}\ntotal_dirty {2}\n",
        ),
    ],
)
def test_weights_in_use_can_be_dropped_from_a_control_group_too(
    tmp_path: Path, names: tuple[str, str], stat: str
) -> None:
    version_2 = names[0] == "memory.max"
    group = tmp_path / "cg" / ("" if version_2 else "memory")
    group.mkdir(parents=True)
    (group / names[0]).write_text(str(7 * GIB))
    (group / names[1]).write_text(str(5 * GIB))  # one anonymous, one written to, three of mapped weights
    (group / "memory.stat").write_text(stat.format(GIB, 3 * GIB, GIB))
    proc = _proc(tmp_path / "p", "0::/\n" if version_2 else "7:memory:/\n")
    (proc / "meminfo").write_text("MemTotal: 67108864 kB\nMemAvailable: 60000000 kB\n")
    found = read_memory(proc, tmp_path / "cg")
    assert (found.total, found.available) == (7 * GIB, 5 * GIB)
    ready = Claim("a", "a", 4 * GIB, State.READY, measured=GIB)
    assert free_memory(found, [ready], 0) == 2 * GIB  # others use one


def test_the_real_machine_has_memory() -> None:
    found = read_memory()
    assert 0 < found.available <= found.total
