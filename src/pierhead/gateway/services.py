"""What every connection shares: settings, routes, keys, metrics, the link to the daemon; knows no transports."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pierhead.config import GatewaySettings
from pierhead.gateway.admission import Admitted, Doorkeeper
from pierhead.gateway.answers import Answers
from pierhead.gateway.auth import Keys
from pierhead.gateway.budgets import Budgets
from pierhead.gateway.cache import Cache
from pierhead.gateway.dialects.base import Save
from pierhead.gateway.faults import Fault
from pierhead.gateway.ledger import MemoryLedger
from pierhead.gateway.link import Endpoint, KeepLoaded, Snapshot, ToDaemon
from pierhead.gateway.metrics import Metrics
from pierhead.gateway.outcome import Outcome
from pierhead.gateway.prices import Prices
from pierhead.gateway.recorder import Recorder, Tee
from pierhead.gateway.routes import RouteTable
from pierhead.gateway.tokens import Tokens
from pierhead.gateway.trace import Tracer
from pierhead.gateway.upstream import Target
from pierhead.gateway.vitals import Lag

if TYPE_CHECKING:
    from pierhead.gateway.answering import Answering
    from pierhead.gateway.booking import Booked
    from pierhead.gateway.observer import Observer

BUFFERED_MAX = 1 << 30  # bytes of request bodies held at once, all connections together


class Services:
    """One per gateway; ``ensure`` asks the daemon for an endpoint and ``idle`` tells it that a replica rests;
    ``emptied`` hears when the last connection of a drain is gone; ``state`` is a folder for what must outlive it.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        doorkeeper: Doorkeeper,
        ensure: Callable[[str, str], Awaitable[Endpoint]],
        idle: Callable[[], None],
        emptied: Callable[[], None],
        room: Budgets | None = None,
        state: Path | None = None,
    ) -> None:
        self.settings = settings
        self.doorkeeper = doorkeeper
        self.room = room or Budgets(MemoryLedger(), settings.answer_tokens)
        self.cache = Cache(settings.cache_size, settings.cache_ttl)
        if settings.oidc_issuer:
            doorkeeper.tokens = Tokens(settings, self.room)
        self.routes = RouteTable(settings.traffic)
        self.metrics = Metrics()
        self.lag = Lag(self.metrics)
        self.connections: set[Answering] = set()
        self.draining = False
        self.now = time.monotonic()  # coarse: renewed by the sweep
        self.buffered = 0
        self.generation = 0
        self.replica_idle = idle
        self.emptied = emptied
        self._ensure = ensure
        self.tell: Callable[[ToDaemon], None] = lambda message: None  # the composition sets it
        self.progress: Callable[[str], str] = lambda model: ""  # how the start of a model gets on
        self.sinks: list[Callable[[Outcome], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.answers = Answers(
            state / "answers.db" if state is not None else None,
            most=settings.stored_answers,
            most_bytes=settings.stored_bytes,
            age=settings.stored_age,
        )
        self.observer: Observer | None = None
        self.recorder: Recorder | None = None
        self.tracer: Tracer | None = None
        self._id_prefix = f"req_{os.urandom(6).hex()}".encode()
        self._ids = 0

    def apply(self, snapshot: Snapshot) -> None:
        """Take over a snapshot; ValueError when its keys are not hex."""
        self.room.prices = Prices(snapshot.prices)
        self.doorkeeper.keys = Keys(snapshot.keys, snapshot.pepper, self.doorkeeper.keys, self.room)
        self.routes.apply(snapshot)
        self.metrics.keep(route.name for route in snapshot.routes)
        self.generation += 1

    def sweep(self, now: float) -> None:
        """Twice a second: what time alone changes. ``now`` is monotonic."""
        self.routes.sweep(now)
        self.room.sweep()
        wall, tokens = time.time(), self.doorkeeper.tokens
        if self.doorkeeper.keys.lapsed(wall) or (tokens is not None and tokens.lapsed(wall)):
            self.generation += 1  # what connections remember of a key's head holds no more

    def new_id(self) -> bytes:
        """A request id that no other request of this host has."""
        self._ids += 1
        return b"%b%x" % (self._id_prefix, self._ids)

    async def ensure_ready(self, model: str, failed: str) -> Target:
        """Wait until the daemon names an endpoint for ``model``; Fault when it cannot."""
        return self.routes.target(await self._ensure(model, failed))

    def keep_loaded(self, model: str, seconds: float) -> None:
        """Have the daemon keep ``model`` loaded for so long after its last request (negative: for ever)."""
        self.tell(KeepLoaded(model=model, seconds=seconds))

    def control(self) -> Target:
        """Where the control API answers."""
        if self.routes.control is None:
            raise self.no_daemon()
        return self.routes.control

    def no_daemon(self) -> Fault:
        """The daemon does not answer."""
        return Fault(503, "daemon_unavailable", "no Pierhead daemon answers.", hint="Start one with: pier serve")

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Do work that no client waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def settled(self, outcome: Outcome | None, relay: Booked) -> None:
        """Hear what became of a request, before its last byte leaves; None for one of the control API."""
        if outcome is not None:
            for sink in self.sinks:
                sink(outcome)
            if self.recorder is not None and isinstance(relay.client, Tee):
                relay.client.settled(outcome)
        elif self.observer is not None:
            self.observer.put_local(relay.facts())

    async def load(self, key: str, name: str) -> bytes | None:
        """What an earlier answer stored under ``name`` for the same API key."""
        return await self.answers.load(key, name)

    async def keep(self, key: str, saves: tuple[Save, ...]) -> None:
        """Store what answers want to find again."""
        await self.answers.keep(key, saves)

    def log_local(
        self, client: Answering, request: Admitted | None, status: int, request_id: bytes, *, logged: bool = False
    ) -> None:
        """One line for an answer of the gateway itself, unless it was logged otherwise."""
        self.metrics.answered(status)
        if self.observer is not None and not logged:
            self.observer.put_local(
                {
                    "time": round(time.time(), 3),
                    "id": request_id.decode("latin-1"),
                    "peer": client.peer,
                    "method": request.method if request else "",
                    "path": request.path if request else "",
                    "status": status,
                    "key": request.key_id if request else "",
                }
            )
