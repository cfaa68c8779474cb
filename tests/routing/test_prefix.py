"""The prefix index: what it says a replica holds, against a plain model of the same."""

from __future__ import annotations

import time
from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from pierhead.routing.prefix import PrefixIndex, chain_of, seed

CHAINS = st.lists(st.integers(0, 12), max_size=8, unique=True)


def test_prompts_that_begin_alike_share_the_chain_up_to_where_they_part() -> None:
    a = chain_of(b"x" * 1000, seed("m"))
    b = chain_of(b"x" * 600 + b"y" * 400, seed("m"))
    assert len(a) == 3  # the last, broken block does not count
    assert a[:2] == b[:2]
    assert a[2] != b[2]


def test_equal_blocks_after_different_ones_are_different() -> None:
    a, b = chain_of(b"a" * 256 + b"z" * 256, 1), chain_of(b"b" * 256 + b"z" * 256, 1)
    assert a[1] != b[1]


def test_models_and_loras_share_nothing() -> None:
    prompt = b"p" * 256
    chains = [chain_of(prompt, seed(m, lora))[0] for m, lora in (("m", ""), ("n", ""), ("m", "l"), ("ml", ""))]
    assert len(set(chains)) == 4


def test_only_so_much_of_a_huge_prompt_counts() -> None:
    assert len(chain_of(bytes(1 << 20), 1, block=64, most=100)) == 100


def test_what_was_sent_is_held_and_a_removed_replica_holds_nothing() -> None:
    index = PrefixIndex(100)
    for name in "ab":
        index.add(name)
    index.put("a", [1, 2, 3])
    index.put("b", [1, 2])
    assert index.depths([1, 2, 3, 4]) == {"a": 3, "b": 2}
    assert index.cached("a", [1, 2, 9]) == 2
    assert index.depths([9, 1, 2]) == {}
    index.remove("a")
    assert index.depths([1, 2, 3]) == {"b": 2}
    index.add("c")  # takes over the place of the one removed, not its blocks
    assert index.depths([1, 2, 3]) == {"b": 2}
    index.put("gone", [1])
    assert index.cached("gone", [1]) == 0


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning() -> None:
    index = PrefixIndex(4)
    index.add("a")
    index.put("a", [1, 2, 3])
    index.put("a", [7, 8])
    assert index.cached("a", [1, 2, 3]) == 2


def test_a_prompt_longer_than_the_cache_leaves_its_beginning() -> None:
    index = PrefixIndex(4)
    index.add("a")
    index.put("a", range(100))
    assert index.cached("a", range(100)) == 4
    assert len(index) == 4


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 10),
    st.lists(st.tuples(st.sampled_from("abc"), CHAINS, st.sampled_from(("put", "swap"))), max_size=40),
)
def test_depths_and_cached_agree_with_a_plain_lru_of_each_replica(
    capacity: int, steps: list[tuple[str, list[int], str]]
) -> None:
    index = PrefixIndex(capacity)
    plain: dict[str, OrderedDict[int, None]] = {name: OrderedDict() for name in "abc"}
    for name in plain:
        index.add(name)
    for name, chain, what in steps:
        if what == "swap":
            index.remove(name)
            index.add(name)
            plain[name].clear()
        index.put(name, chain)
        for block in reversed(chain):
            plain[name][block] = None
            plain[name].move_to_end(block)
        while len(plain[name]) > capacity:
            plain[name].popitem(last=False)
        for probe in (chain, chain[:3], list(range(5))):
            expected = {n: next((i for i, b in enumerate(probe) if b not in p), len(probe)) for n, p in plain.items()}
            assert {n: index.cached(n, probe) for n in plain} == expected
            assert index.depths(probe) == {n: d for n, d in expected.items() if d}
    assert len(index) == len({block for held in plain.values() for block in held})


def test_long_chains_over_many_replicas_cost_steps_for_each_block_and_not_for_each_pair() -> None:
    chain = list(range(250))

    def seconds(replicas: int) -> float:
        index = PrefixIndex(2500)
        for i in range(replicas):
            index.add(str(i))
            index.put(str(i), chain)
        best = 1.0
        for _ in range(20):
            start = time.perf_counter()
            index.depths(chain)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(64) < 8 * seconds(1)
