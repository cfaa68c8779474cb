"""Who gets memory and who must leave for it: pure decisions over the ledger of claims; stops nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from pierhead.errors import OutOfMemory
from pierhead.fleet.memory import Memory
from pierhead.fleet.state import State

T = TypeVar("T")

_GONE = frozenset({State.STOPPED, State.FAILED})
_LEAVING = frozenset({State.DRAINING, State.STOPPING})
# states in which memory is used, not only promised
_TOUCHED = frozenset({State.READY, State.DOZING, State.SLEEPING, State.DRAINING, State.STOPPING})


@dataclass(frozen=True)
class Claim:
    """What one replica holds: ``memory`` bytes that it may come to use; ``open`` requests it is answering.

    ``measured`` are the anonymous bytes that it has now (0: not known), ``weights`` those of it that are mapped files.
    ``ready_at`` and ``last_used`` (at least
    ``ready_at``) are Unix times. One that is not ``settled`` was started a moment ago and waits for its first request.
    ``devices`` are bytes on each accelerator, by its CDI name.
    """

    replica: str
    model: str
    memory: int
    state: State
    open: int = 0
    pinned: bool = False
    last_used: float = 0.0
    ready_at: float = 0.0
    measured: int = 0
    weights: int = 0
    settled: bool = True
    devices: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def evictable(self) -> bool:
        """Whether it may be stopped for another model: it is ready or asleep, idle, not pinned and not just started."""
        return self.state in (State.READY, State.SLEEPING) and self.open == 0 and not self.pinned and self.settled

    @property
    def seen(self) -> int:
        """Bytes of the claim that what is available now is already less by; unread, no more than is sure."""
        return (self.measured or max(0, self.memory - self.weights)) if self.state in _TOUCHED else 0

    @property
    def back(self) -> int:
        """Bytes that may become available once it is gone; unread, all that it may hold."""
        return (self.measured or self.memory) if self.state in _TOUCHED else 0


@dataclass(frozen=True)
class Decision(Generic[T]):
    """What to do: stop the ``evict`` replicas, in order, then start ``plan``."""

    plan: T
    evict: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wait:
    """Nothing can leave now, but there will be room once those who hold it are idle; ``why`` names them."""

    why: OutOfMemory


def free_memory(memory: Memory, claims: Sequence[Claim], reserve: int, leaving: Sequence[Claim] = ()) -> int:
    """Bytes a new replica may use beside ``claims``, once those that are ``leaving`` are gone.

    Claims are taken off the total, and off what is available now as far as that is not less by them already: what is
    loading has not touched its memory yet, and the weights of what is ready are mapped files, which the kernel counts
    as available.
    """
    held = [c for c in claims if c.state not in _GONE]
    claimed = sum(c.memory for c in held)
    back = sum(c.seen for c in held) + sum(c.back for c in leaving)
    available = min(memory.total, memory.available + back)
    return max(0, min(available, memory.total) - claimed - reserve)


def decide(
    claims: Sequence[Claim],
    memory: Memory,
    reserve: int,
    plan: Callable[[int], T],
    *,
    evict: bool = True,
    smaller: Callable[[int], T] | None = None,
) -> Decision[T] | Wait:
    """The plan for the memory that is free, or with as few evictions as make it fit, the longest unused first.

    What is leaving counts as gone: start when ``free_memory`` with it says so. Without ``evict`` nobody leaves.
    ``plan(free)`` raises OutOfMemory when ``free`` bytes are too few; then it waits, if it would fit once the busy are
    idle. Where it never would, ``smaller`` plans with less, after all have left who may. Raises OutOfMemory with the
    numbers and the names of those who hold memory where nothing of that helps.
    """
    leaving = [c for c in claims if c.state in _LEAVING]
    left = [c for c in claims if c.state not in _LEAVING and c.state not in _GONE]
    victims = sorted((c for c in left if evict and c.evictable), key=lambda c: (c.last_used, c.replica))
    chosen: list[Claim] = []
    while True:
        try:
            free = free_memory(memory, left, reserve, [*leaving, *chosen])
            return Decision(plan(free), tuple(c.replica for c in chosen))
        except OutOfMemory as exc:
            refusal = exc
        if not victims:
            break
        chosen.append(victims.pop(0))
        left.remove(chosen[-1])
    why = _explained(refusal, claims, memory, reserve)
    if evict and _fits_one_day(claims, memory, reserve, plan):
        return Wait(why)
    if smaller is not None:
        try:
            free = free_memory(memory, left, reserve, [*leaving, *chosen])
            return Decision(smaller(free), tuple(c.replica for c in chosen))
        except OutOfMemory:
            if evict and _fits_one_day(claims, memory, reserve, smaller):
                return Wait(why)
    raise why from refusal


def _fits_one_day(claims: Sequence[Claim], memory: Memory, reserve: int, plan: Callable[[int], T]) -> bool:
    """Whether it fits once all have left but the pinned."""
    pinned = [c for c in claims if c.pinned and c.state not in _GONE]
    others = [c for c in claims if not c.pinned and c.state not in _GONE]
    if not others:
        return False
    try:
        plan(free_memory(memory, pinned, reserve, others))
    except OutOfMemory:
        return False
    return True


def overdrawn(claims: Sequence[Claim], memory: Memory, reserve: int) -> tuple[str, ...]:
    """Who leaves because replicas turned out to use more than was estimated; the longest unused first."""
    left = [c for c in claims if c.state not in _GONE and c.state not in _LEAVING]
    debt = sum(c.memory for c in left) + reserve - memory.total
    leave: list[str] = []
    for claim in sorted((c for c in left if c.evictable), key=lambda c: (c.last_used, c.replica)):
        if debt <= 0:
            break
        leave.append(claim.replica)
        debt -= claim.memory
    return tuple(leave)


def on_device(claims: Sequence[Claim], device: str) -> list[Claim]:
    """The same ledger for one accelerator: what each replica holds there."""
    return [replace(c, memory=c.devices[device], measured=0, weights=0) for c in claims if c.devices.get(device)]


def choose_device(
    claims: Sequence[Claim], devices: Mapping[str, Memory], reserve: int, need: int
) -> tuple[str, Decision[int] | Wait]:
    """The accelerator with the most free memory that ``need`` bytes fit on, with as few evictions as possible.

    Raises OutOfMemory where they fit on none.
    """

    def plan(free: int) -> int:
        if free < need:
            raise OutOfMemory(f"{need} bytes of accelerator memory are needed, {free} are free", data={"needed": need})
        return need

    found: list[tuple[bool, int, int, str, Decision[int] | Wait]] = []
    refusal: OutOfMemory | None = None
    for name, memory in sorted(devices.items()):
        here = on_device(claims, name)
        try:
            outcome = decide(here, memory, reserve, plan)
        except OutOfMemory as exc:
            refusal = exc
            continue
        leave = len(outcome.evict) if isinstance(outcome, Decision) else 0
        found.append((isinstance(outcome, Wait), leave, -free_memory(memory, here, reserve), name, outcome))
    if not found:
        raise refusal or OutOfMemory("there is no accelerator", hint="`pier doctor` shows what this machine has.")
    *_, name, outcome = min(found, key=lambda f: f[:4])
    return name, outcome


def _explained(exc: OutOfMemory, claims: Sequence[Claim], memory: Memory, reserve: int) -> OutOfMemory:
    holders = [c for c in claims if c.memory and not c.evictable and c.state not in _GONE]
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
    held = ", ".join(f"{c.model} ({_holds(c)})" for c in holders)
    hint = exc.hint or "Use a smaller model or context."
    if held:
        hint = f"Stop what holds memory: {held}: `pier stop {holders[0].model}`. {hint}"
    return OutOfMemory(exc.message, hint=hint, data=data)


def _holds(claim: Claim) -> str:
    """Why it does not leave."""
    if claim.pinned:
        return "pinned"
    return "busy" if claim.state is State.READY else claim.state.value
