"""Who gets memory and who leaves for it; and how much there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import OutOfMemory
from pierhead.fleet.memory import Memory, read_memory
from pierhead.fleet.scheduler import Claim, decide, free_memory
from pierhead.fleet.state import State

GIB = 1 << 30


def needs(size: int):
    """A plan that needs ``size`` bytes."""

    def plan(free: int) -> int:
        if free < size:
            raise OutOfMemory(f"needs {size}, {free} free", data={"needed": size, "free": free})
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
        decision = decide(held, memory, reserve, needs(need))
    except OutOfMemory:
        assert need > free_memory(memory, held, reserve)
        return
    assert decision.evict == tuple(c.replica for c in idle[: len(decision.evict)])
    if need <= free_memory(memory, held, reserve):
        assert decision.evict == ()
    assert all(not c.pinned and not c.open for c in held if c.replica in decision.evict)


def test_a_model_that_fits_evicts_nobody() -> None:
    held = [Claim("a", "a", GIB, State.READY)]
    assert decide(held, Memory(8 * GIB, 6 * GIB), 0, needs(GIB)).evict == ()


def test_as_few_idle_models_leave_as_make_room() -> None:
    held = [Claim(str(n), f"m{n}", 2 * GIB, State.READY, last_used=n) for n in range(3)]
    assert decide(held, Memory(8 * GIB, 2 * GIB), 0, needs(3 * GIB)).evict == ("0",)
    assert decide(held, Memory(8 * GIB, 2 * GIB), 0, needs(5 * GIB)).evict == ("0", "1")


def test_the_refusal_names_the_numbers_and_who_holds_memory() -> None:
    held = [
        Claim("a", "gemma", 2 * GIB, State.READY, open=1),
        Claim("b", "qwen", GIB, State.READY, pinned=True),
    ]
    with pytest.raises(OutOfMemory) as caught:
        decide(held, Memory(4 * GIB, GIB), 0, needs(3 * GIB))
    assert "gemma (busy), qwen (pinned)" in (caught.value.hint or "")
    assert [h["replica"] for h in caught.value.data["holders"]] == ["a", "b"]


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


def test_the_real_machine_has_memory() -> None:
    found = read_memory()
    assert 0 < found.available <= found.total
