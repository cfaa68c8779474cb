"""Who gets memory and who must leave for it: pure decisions over the ledger of claims; stops nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pierhead.errors import OutOfMemory
from pierhead.fleet.memory import Memory
from pierhead.fleet.state import State

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """What one replica holds: ``memory`` is its estimate in bytes; ``open`` requests it is answering.

    ``ready_at`` and ``last_used`` (at least ``ready_at``) are Unix times.
    """

    replica: str
    model: str
    memory: int
    state: State
    open: int = 0
    pinned: bool = False
    last_used: float = 0.0
    ready_at: float = 0.0

    @property
    def evictable(self) -> bool:
        """Whether it may be stopped for another model: it is ready, idle and not pinned."""
        return self.state is State.READY and self.open == 0 and not self.pinned


@dataclass(frozen=True)
class Decision(Generic[T]):
    """What to do: stop the ``evict`` replicas, in order, then start ``plan``."""

    plan: T
    evict: tuple[str, ...] = ()


def free_memory(memory: Memory, claims: Sequence[Claim], reserve: int) -> int:
    """Bytes a new replica may use.

    What is loading has not touched its memory yet, and the weights of what is ready are mapped files, which the
    kernel counts as available: so claims are taken off the total as well as off what is free now.
    """
    unseen = sum(c.memory for c in claims if c.state in (State.CREATED, State.PREPARING, State.STARTING, State.LOADING))
    claimed = sum(c.memory for c in claims if c.state not in (State.STOPPED, State.FAILED))
    return max(0, min(memory.available - unseen, memory.total - claimed) - reserve)


def decide(
    claims: Sequence[Claim], memory: Memory, reserve: int, plan: Callable[[int], T], *, evict: bool = True
) -> Decision[T]:
    """The plan for the memory that is free, or with as few evictions as make it fit, the longest unused first.

    Without ``evict`` nobody leaves. ``plan(free)`` raises OutOfMemory when ``free`` bytes are too few. Raises
    OutOfMemory with the numbers and the names of those who hold memory when even evicting all that may be evicted does
    not help.
    """
    left = list(claims)
    leave: list[str] = []
    victims = sorted((c for c in claims if evict and c.evictable), key=lambda c: (c.last_used, c.replica))
    gained = 0
    while True:
        base = free_memory(memory, left, reserve)
        try:
            return Decision(plan(base if not leave else _after(memory, left, reserve, gained)), tuple(leave))
        except OutOfMemory as exc:
            if not victims:
                raise _explained(exc, claims, memory, reserve) from exc
        victim = victims.pop(0)
        left.remove(victim)
        leave.append(victim.replica)
        gained += victim.memory


def _after(memory: Memory, left: Sequence[Claim], reserve: int, gained: int) -> int:
    """What is free once evicted replicas have given back what they claimed."""
    after = Memory(memory.total, min(memory.total, memory.available + gained), memory.bound)
    return free_memory(after, left, reserve)


def _explained(exc: OutOfMemory, claims: Sequence[Claim], memory: Memory, reserve: int) -> OutOfMemory:
    holders = [c for c in claims if c.memory and not c.evictable and c.state not in (State.STOPPED, State.FAILED)]
    data = {
        **exc.data,
        "total": memory.total,
        "available": memory.available,
        "reserve": reserve,
        "bound": memory.bound,
        "holders": [
            {"replica": c.replica, "model": c.model, "memory": c.memory, "open": c.open, "pinned": c.pinned}
            for c in holders
        ],
    }
    held = ", ".join(f"{c.model} ({'pinned' if c.pinned else 'busy'})" for c in holders)
    hint = exc.hint or "Use a smaller model or context."
    if held:
        hint = f"Stop what holds memory: {held}: `pier stop {holders[0].model}`. {hint}"
    return OutOfMemory(exc.message, hint=hint, data=data)
