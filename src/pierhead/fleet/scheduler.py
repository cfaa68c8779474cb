"""Who gets memory and who must leave for it: pure decisions over the ledger of claims; stops nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import msgspec

from pierhead.engines.gpus import Device
from pierhead.errors import OutOfMemory
from pierhead.fleet.memory import BUDGET, Memory
from pierhead.fleet.state import State

T = TypeVar("T")

_GONE = frozenset({State.STOPPED, State.FAILED})
_LEAVING = frozenset({State.DRAINING, State.STOPPING})
# states in which memory is used, not only promised
_TOUCHED = frozenset({State.READY, State.DOZING, State.SLEEPING, State.DRAINING, State.STOPPING})
DEVICE_RESERVE = 256 << 20  # bytes of each accelerator that are left to its driver and to others


@dataclass(frozen=True)
class Claim:
    """What one replica holds: ``memory`` bytes that it may come to use; ``open`` requests it is answering.

    ``measured`` are the anonymous bytes that it has now (0: not known), ``weights`` those of it that are mapped files.
    ``ready_at`` and ``last_used`` (at least
    ``ready_at``) are Unix times. One that is not ``settled`` was started a moment ago and waits for its first request.
    ``devices`` are bytes on each accelerator, by its CDI name, and ``read`` those that it was last seen to have there.
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
    read: Mapping[str, int] = field(default_factory=dict[str, int])

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
class Machine:
    """What there is: the machine's own ``memory``, and each accelerator with what is free on it now."""

    memory: Memory
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True)
class Room:
    """What a new replica may use: bytes of ``memory``, and each accelerator with the bytes that are ``free`` for it."""

    memory: int
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True)
class Decision(Generic[T]):
    """What to do: stop the ``evict`` replicas, in order, then start ``plan``."""

    plan: T
    evict: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wait:
    """Nothing can leave now, but there will be room once those who hold it are idle; ``why`` names them."""

    why: OutOfMemory


def limited_devices(devices: Sequence[Device], budget: int) -> tuple[Device, ...]:
    """The same with a budget of bytes for each (0: none)."""
    return tuple(msgspec.structs.replace(d, total=min(d.total, budget or d.total)) for d in devices)


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


def free_room(machine: Machine, claims: Sequence[Claim], reserve: int, leaving: Sequence[Claim] = ()) -> Room:
    """``free_memory`` of the machine itself and of each accelerator."""

    def free(device: Device) -> int:
        own = Memory(device.total, device.free)
        return free_memory(own, on_device(claims, device.name), DEVICE_RESERVE, on_device(leaving, device.name))

    return Room(
        free_memory(machine.memory, claims, reserve, leaving),
        tuple(msgspec.structs.replace(d, free=free(d)) for d in machine.devices),
    )


def decide(
    claims: Sequence[Claim],
    machine: Machine,
    reserve: int,
    plan: Callable[[Room], T],
    *,
    evict: bool = True,
    smaller: Callable[[Room], T] | None = None,
) -> Decision[T] | Wait:
    """The plan for the room that there is, or with as few evictions as make it fit, the longest unused first.

    What is leaving counts as gone: start when ``free_room`` with it says so. Without ``evict`` nobody leaves.
    ``plan(room)`` raises OutOfMemory when that is too little; then it waits, if it would fit once the busy are idle.
    An error whose data name a ``device`` is mended only by those who hold memory of accelerators, others stay. Where it
    never would fit, ``smaller`` plans with less, after all have left who may. Raises OutOfMemory with the numbers and
    the names of those who hold memory where nothing of that helps.
    """
    leaving = [c for c in claims if c.state in _LEAVING]
    left = [c for c in claims if c.state not in _LEAVING and c.state not in _GONE]
    victims = sorted((c for c in left if evict and c.evictable), key=lambda c: (c.last_used, c.replica))
    chosen: list[Claim] = []
    while True:
        try:
            found = plan(free_room(machine, left, reserve, [*leaving, *chosen]))
        except OutOfMemory as exc:
            refusal = exc
        else:
            return _sparing(Decision(found, tuple(c.replica for c in chosen)), claims, machine, reserve, plan)
        helpful = next((c for c in victims if c.devices or "device" not in refusal.data), None)
        if helpful is None:
            break
        victims.remove(helpful)
        chosen.append(helpful)
        left.remove(helpful)
    why = _explained(refusal, claims, machine.memory, reserve)
    if evict and _fits_one_day(claims, machine, reserve, plan):
        return Wait(why)
    if smaller is not None:
        try:
            room = free_room(machine, left, reserve, [*leaving, *chosen])
            return Decision(smaller(room), tuple(c.replica for c in chosen))
        except OutOfMemory:
            if evict and _fits_one_day(claims, machine, reserve, smaller):
                return Wait(why)
    raise why from refusal


def _sparing(
    decision: Decision[T], claims: Sequence[Claim], machine: Machine, reserve: int, plan: Callable[[Room], T]
) -> Decision[T]:
    """The same without those who need not leave, since another accelerator than theirs has room by now."""
    held = {c.replica: c for c in claims if c.state not in _GONE}
    for name in decision.evict if len(decision.evict) > 1 and machine.devices else ():
        rest = tuple(other for other in decision.evict if other != name)
        leaving = [c for c in held.values() if c.state in _LEAVING or c.replica in rest]
        staying = [c for c in held.values() if c not in leaving]
        with contextlib.suppress(OutOfMemory):
            decision = Decision(plan(free_room(machine, staying, reserve, leaving)), rest)
    return decision


def _fits_one_day(claims: Sequence[Claim], machine: Machine, reserve: int, plan: Callable[[Room], T]) -> bool:
    """Whether it fits once all have left but the pinned."""
    pinned = [c for c in claims if c.pinned and c.state not in _GONE]
    others = [c for c in claims if not c.pinned and c.state not in _GONE]
    if not others:
        return False
    try:
        plan(free_room(machine, pinned, reserve, others))
    except OutOfMemory:
        return False
    return True


def overdrawn(claims: Sequence[Claim], machine: Machine, reserve: int) -> tuple[str, ...]:
    """Who leaves because replicas turned out to use more than was estimated; the longest unused first."""
    left = [c for c in claims if c.state not in _GONE and c.state not in _LEAVING]
    leave = _debtors(left, machine.memory.total - reserve)
    for device in machine.devices:
        here = [c for c in on_device(left, device.name) if c.replica not in leave]
        leave += _debtors(here, device.total - DEVICE_RESERVE)
    return tuple(leave)


def _debtors(claims: Sequence[Claim], budget: int) -> list[str]:
    debt = sum(c.memory for c in claims) - budget
    leave: list[str] = []
    for claim in sorted((c for c in claims if c.evictable), key=lambda c: (c.last_used, c.replica)):
        if debt <= 0:
            break
        leave.append(claim.replica)
        debt -= claim.memory
    return leave


def on_device(claims: Sequence[Claim], device: str) -> list[Claim]:
    """The same ledger for one accelerator: what each replica holds there."""
    return [
        replace(c, memory=c.devices[device], measured=c.read.get(device, 0), weights=0)
        for c in claims
        if c.devices.get(device)
    ]


def _explained(exc: OutOfMemory, claims: Sequence[Claim], memory: Memory, reserve: int) -> OutOfMemory:
    on_device = "device" in exc.data
    holders = [c for c in claims if (c.devices if on_device else c.memory) and not c.evictable and c.state not in _GONE]
    data = dict(exc.data)
    if not on_device:
        data |= {
            "total": memory.total,
            "available": memory.available,
            "reserve": reserve,
            "bound": memory.bound,
        }
    data["holders"] = [
        {"replica": c.replica, "model": c.model, "memory": c.memory, "open": c.open, "pinned": c.pinned}
        for c in holders
    ]
    held = ", ".join(f"{c.model} ({_holds(c)})" for c in holders)
    hint = exc.hint or "Use a smaller model or context."
    message = exc.message
    ever = on_device or int(data.get("needed", 0)) <= memory.total - reserve
    if not on_device and memory.bound == BUDGET:
        message += f" of the budget of {memory.total >> 20:,} MiB, of which {reserve >> 20:,} MiB stay in reserve"
        if not ever:
            hint = f"Raise {BUDGET}, lower [engine] memory_reserve, or use a smaller model."
    if held and ever:
        hint = f"Stop what holds memory: {held}: `pier stop {holders[0].model}`. {hint}"
    return OutOfMemory(message, hint=hint, data=data)


def _holds(claim: Claim) -> str:
    """Why it does not leave."""
    if claim.pinned:
        return "pinned"
    return "busy" if claim.state is State.READY else claim.state.value
