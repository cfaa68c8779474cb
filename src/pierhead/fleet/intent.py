"""How a model is kept, and what follows from it for its replicas: pure decisions; starts and stops nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pierhead.fleet.scheduler import Claim
from pierhead.fleet.state import State

IDLE_GRACE = 10.0  # a model that nobody used yet stays at least this long (seconds)

_TRYING = frozenset({State.CREATED, State.PREPARING, State.STARTING, State.LOADING, State.FAILED})


@dataclass
class Intent:
    """How a model is kept, the same for all of its replicas.

    ``keep_alive`` in seconds; ``asked`` is the Unix time at which somebody last said so. With ``replicas`` 0 it ends.
    """

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    runtime: str | None = None  # as asked for; None: the default
    keep_alive: float = 300.0
    pinned: bool = False
    replicas: int = 1
    asked: float = 0.0


@dataclass(frozen=True)
class Change:
    """What to do about a model: start one more replica, and drain these."""

    start: bool = False
    stop: tuple[str, ...] = ()


def change(claims: Sequence[Claim], wanted: int) -> Change:
    """What brings the replicas of one model, without those that leave, nearer to the wanted number.

    They are started one after the other: the first answers sooner, the next find the weights in memory, and where one
    cannot start another could not either. Of too many the failed leave first, then those that are not ready, then the
    least used.
    """
    surplus = len(claims) - wanted
    if surplus > 0:
        order = sorted(claims, key=lambda c: (c.state is not State.FAILED, c.state is State.READY, c.open, c.last_used))
        return Change(stop=tuple(c.replica for c in order[:surplus]))
    return Change(start=surplus < 0 and not any(c.state in _TRYING for c in claims))


def idle_at(claims: Sequence[Claim], keep_alive: float) -> float | None:
    """Unix time at which a model has been unused for long enough to be stopped, None while that is not in sight.

    All of its replicas count as one: balancing prefers some of them, and the others are not idle for that.
    """
    claims = [c for c in claims if c.state is not State.FAILED]
    if keep_alive < 0 or not claims or any(c.state is not State.READY or c.open or c.pinned for c in claims):
        return None
    unused = all(c.last_used <= c.ready_at for c in claims)
    return max(c.last_used for c in claims) + max(keep_alive, IDLE_GRACE if unused else 0.0)
