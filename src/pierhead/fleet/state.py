"""The life of one replica as a pure state machine: which state may follow which; runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pierhead.errors import PierError


class State(StrEnum):
    """Where a replica is in its life."""

    CREATED = "created"  # asked for; waiting for memory
    PREPARING = "preparing"  # its image or folder is being made
    STARTING = "starting"  # its program is being started
    LOADING = "loading"  # the program runs and loads the model
    READY = "ready"  # it answers
    DOZING = "dozing"  # no new requests; finishing those it has, and then asleep
    SLEEPING = "sleeping"  # its program runs and has let go of its accelerators' memory
    DRAINING = "draining"  # no new requests; finishing those it has
    STOPPING = "stopping"  # its program is being ended
    STOPPED = "stopped"  # gone, as asked
    BACKOFF = "backoff"  # it crashed and waits to be started again
    FAILED = "failed"  # gone, and not started again by itself


TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.CREATED: frozenset({State.PREPARING, State.LOADING, State.READY, State.STOPPING, State.FAILED}),
    State.PREPARING: frozenset({State.STARTING, State.STOPPING, State.FAILED}),
    State.STARTING: frozenset({State.PREPARING, State.LOADING, State.BACKOFF, State.STOPPING, State.FAILED}),
    State.LOADING: frozenset({State.READY, State.BACKOFF, State.STOPPING, State.FAILED}),
    State.READY: frozenset({State.DOZING, State.DRAINING, State.STOPPING, State.BACKOFF, State.FAILED}),
    State.DOZING: frozenset({State.SLEEPING, State.READY, State.DRAINING, State.STOPPING, State.BACKOFF, State.FAILED}),
    State.DRAINING: frozenset({State.STOPPING}),
    State.SLEEPING: frozenset({State.LOADING, State.STOPPING, State.BACKOFF, State.FAILED}),
    State.STOPPING: frozenset({State.STOPPED}),
    State.BACKOFF: frozenset({State.STARTING, State.STOPPING, State.FAILED}),
    State.FAILED: frozenset({State.STOPPING}),
    State.STOPPED: frozenset(),
}

COMING = frozenset({State.CREATED, State.PREPARING, State.STARTING, State.LOADING, State.BACKOFF})
"""States that lead to ``ready`` unless something goes wrong."""

LEAVING = frozenset({State.DRAINING, State.STOPPING, State.STOPPED})
"""States from which ``ready`` is not reached again."""


class IllegalTransition(PierError):
    """A bug in Pierhead: a replica was moved to a state that may not follow its own."""

    code = "illegal_transition"


@dataclass(frozen=True)
class Status:
    """A state, since when (Unix time) it holds, and the error that led to it."""

    state: State
    since: float
    error: PierError | None = None

    def to(self, state: State, now: float, error: PierError | None = None) -> Status:
        """The status after moving to ``state``; raises IllegalTransition when it may not follow."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"a replica that is {self.state} cannot become {state}")
        return Status(state, now, error)


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a restart: ``initial`` doubled each time up to ``maximum`` seconds, ``limit`` times.

    A replica that stayed ready for ``stable`` seconds starts counting anew.
    """

    initial: float
    maximum: float
    limit: int
    stable: float = 60.0

    def count(self, restarts: int, ready_for: float) -> int:
        """The restarts that count when a replica ends after having been ready for ``ready_for`` seconds."""
        return 0 if ready_for >= self.stable else restarts

    def delay(self, restarts: int) -> float | None:
        """Seconds to wait before restart number ``restarts + 1``; None when the limit is reached."""
        if restarts >= self.limit:
            return None
        return min(self.maximum, self.initial * 2.0 ** min(restarts, 60))
