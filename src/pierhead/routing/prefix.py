"""Which replica probably holds the beginning of a prompt: chained block hashes and an LRU of them for each replica.

Asks no engine. What a replica holds is concluded from what was sent there, so it can be wrong in both directions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 256  # bytes of a prompt in one block, about 64 tokens
MOST = 4096  # blocks of one prompt that count; the rest of a longer one is never found in a cache


def seed(model: str, lora: str = "") -> int:
    """What the chains of one model with one LoRA begin with: equal prompts for different ones share no block."""
    return hash((model, lora))


def chain_of(prompt: bytes, start: int, block: int = BLOCK, most: int = MOST) -> list[int]:
    """One number for each whole block of ``prompt``; each depends on all bytes before it and on ``start``.

    The numbers hold within this process only. Its salt keeps them from being guessed by who writes prompts.
    """
    chain: list[int] = []
    link = start
    for at in range(0, min(len(prompt) - block + 1, block * most), block):
        link = hash((link, prompt[at : at + block]))
        chain.append(link)
    return chain


class PrefixIndex:
    """The blocks that each replica probably holds, at most ``capacity`` for one replica if nothing else is told of it.

    A look-up costs one step for each block of the prompt and one for each replica, not their product: a block knows
    its replicas as the bits of one number. The end of a prompt is forgotten before its beginning, as engines do.
    """

    __slots__ = ("_bits", "_capacities", "_capacity", "_everyone", "_free", "_held", "_holders", "_next")

    def __init__(self, capacity: int) -> None:
        self._capacity = max(1, capacity)
        self._holders: dict[int, int] = {}  # block → bits of the replicas that hold it
        self._bits: dict[str, int] = {}
        self._capacities: dict[str, int] = {}
        self._held: dict[str, OrderedDict[int, None]] = {}
        self._free: list[int] = []
        self._next = 1
        self._everyone = 0

    def __len__(self) -> int:
        """How many different blocks are known."""
        return len(self._holders)

    def add(self, replica: str, capacity: int = 0) -> None:
        """A replica with an empty cache of ``capacity`` blocks (0: the index's own)."""
        if replica in self._bits:
            return
        self._capacities[replica] = capacity or self._capacity
        if self._free:
            bit = self._free.pop()
        else:
            bit, self._next = self._next, self._next << 1
        self._bits[replica] = bit
        self._everyone |= bit
        self._held[replica] = OrderedDict()

    def remove(self, replica: str) -> None:
        """The replica and its cache are gone."""
        bit = self._bits.pop(replica, 0)
        if not bit:
            return
        del self._capacities[replica]
        for block in self._held.pop(replica):
            self._drop(block, bit)
        self._everyone &= ~bit
        self._free.append(bit)

    def cached(self, replica: str, chain: Sequence[int]) -> int:
        """How many leading blocks of ``chain`` the replica holds."""
        held = self._held.get(replica)
        count = 0
        if held:
            for block in chain:
                if block not in held:
                    break
                count += 1
        return count

    def depths(self, chain: Sequence[int]) -> dict[str, int]:
        """For each replica that holds any, how many leading blocks of ``chain`` it holds."""
        holders = self._holders
        alive = self._everyone
        lost: list[tuple[int, int]] = []  # (bits, blocks held)
        count = 0
        for block in chain:
            left = alive & holders.get(block, 0)
            if left != alive:
                if count:
                    lost.append((alive & ~left, count))
                alive = left
                if not alive:
                    break
            count += 1
        if alive and count:
            lost.append((alive, count))
        if not lost:
            return {}
        found: dict[str, int] = {}
        for replica, bit in self._bits.items():
            for bits, depth in lost:
                if bits & bit:
                    found[replica] = depth
                    break
        return found

    def put(self, replica: str, chain: Sequence[int]) -> None:
        """The replica was given a prompt with this chain: it holds it now, and forgets what it used longest ago."""
        held = self._held.get(replica)
        if held is None:
            return
        bit = self._bits[replica]
        holders = self._holders
        for block in reversed(chain):
            if block in held:
                held.move_to_end(block)
            else:
                held[block] = None
                holders[block] = holders.get(block, 0) | bit
        capacity = self._capacities[replica]
        while len(held) > capacity:
            self._drop(held.popitem(last=False)[0], bit)

    def _drop(self, block: int, bit: int) -> None:
        left = self._holders[block] & ~bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]
