"""What one replica is given when it is made; does nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pierhead.engines.base import LaunchSpec, Plan
from pierhead.errors import PierError
from pierhead.events import Listener
from pierhead.fleet.intent import Intent
from pierhead.fleet.state import Backoff
from pierhead.fleet.wish import Wish
from pierhead.runtimes.base import Runtime
from pierhead.store.model import ModelRecord

if TYPE_CHECKING:
    from pierhead.fleet.replica import Replica


Build = Callable[[LaunchSpec, ModelRecord, Runtime, Listener], Awaitable[LaunchSpec]]
"""Sees that what the spec's engine needs built for this machine is there; the spec with its place."""


async def builds_nothing(spec: LaunchSpec, model: ModelRecord, runtime: Runtime, listener: Listener) -> LaunchSpec:
    """For fleets whose engines need none."""
    return spec


Adapt = Callable[["Replica"], Awaitable[None]]
"""Sees that a replica which has just been started has its LoRA adapters, before anyone asks for them."""


async def adapts_nothing(replica: Replica) -> None:
    """For fleets whose engines have what they were started with."""


Readmit = Callable[["Replica"], Awaitable[None]]
"""Finds room on its accelerators for a replica that sleeps and is to wake; OutOfMemory when there is none."""


async def has_room(replica: Replica) -> None:
    """For fleets whose sleepers keep their memory."""


@dataclass
class Life:
    """What one replica is given: the model, how that is kept, who listens, and the times that rule its life (seconds).

    A ``spare`` was started beside others of its model: no other model leaves for it.
    """

    id: str
    model: ModelRecord
    intent: Intent
    listeners: list[Listener]
    backoff: Backoff
    folder: Path
    start_timeout: float
    withdrawn: Callable[[], Awaitable[None]]  # returns once nobody sends it new requests and ``open`` is exact
    parallel: int = 1
    build: Build = builds_nothing
    spare: bool = False
    wish: Wish | None = None  # not known before it is given its place
    adapt: Adapt = adapts_nothing
    readmit: Readmit = has_room
    lease: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


Admit = Callable[["Replica", PierError | None], Awaitable[tuple[Plan, str, Runtime]]]
"""Gives a replica its place; the error is why the runtime it was given before could not start it."""
