"""Keeps the replicas of this host: shared starts, memory, idle unload, adoption; a runtime knows where they run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pierhead.config import Settings
from pierhead.engines.base import Engine, Plan
from pierhead.errors import DaemonUnavailable, NotFound, PierError
from pierhead.events import Listener, Note, Ready, ignore
from pierhead.fleet import adoption
from pierhead.fleet import record as records
from pierhead.fleet.choice import RuntimeChooser
from pierhead.fleet.holdings import Models
from pierhead.fleet.info import ReplicaInfo, describe_replica
from pierhead.fleet.memory import Memory, read_memory
from pierhead.fleet.planning import Planning
from pierhead.fleet.replica import Life, Replica
from pierhead.fleet.scheduler import decide
from pierhead.fleet.state import COMING, LEAVING, Backoff, State
from pierhead.runtimes.base import Instance, Runtime
from pierhead.store.model import ModelRecord

log = logging.getLogger(__name__)


class Supervisor:
    """All replicas of this host. ``changed`` is called after every change that routes or listings show."""

    def __init__(
        self,
        *,
        store: Models,
        engines: Sequence[Engine],
        runtimes: Mapping[str, Runtime],
        settings: Settings,
        replicas_dir: Path,
        changed: Callable[[], None] = lambda: None,
        withdrawn: Callable[[], Awaitable[None]] | None = None,
        memory: Callable[[], Memory] = read_memory,
        trusted: Callable[[ModelRecord], object] = lambda record: None,
    ) -> None:
        self._store = store
        self._planning = Planning(store, engines, settings.engine, trusted)
        self._settings = settings
        self._dir = replicas_dir
        self._changed = changed
        self._memory = memory
        self._withdrawn = withdrawn or _at_once
        self.chooser = RuntimeChooser(runtimes, settings.runtime.default)
        self._replicas: dict[str, Replica] = {}
        self._current: dict[str, Replica] = {}  # by model digest
        self._admission = asyncio.Lock()
        self._adopted = asyncio.Event()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    # --- what others ask for --------------------------------------------------------------------------------------

    async def ensure_ready(
        self,
        model: str,
        *,
        runtime: str | None = None,
        settings: Mapping[str, Any] | None = None,
        keep_alive: float | None = None,
        pin: bool | None = None,
        failed: str = "",
        listener: Listener = ignore,
        by_request: bool = False,
    ) -> ReplicaInfo:
        """Return once a replica of ``model`` answers; callers for one model share one start.

        ``settings`` and ``runtime`` that differ from those of what runs restart it. ``failed`` names a replica that
        the caller saw break: it is examined first. ``by_request``: a client's request asks, and no person. Raises
        NotFound, OutOfMemory, EngineFailed with the engine's last lines, and what a runtime raises.
        """
        began = time.monotonic()
        await self._adopted.wait()
        record = self._store.get(model)
        self.chooser.check(runtime)
        wanted = self._planning.asked(record, settings)
        if failed:
            await self._examine(failed)
        replica = await self._take(record, runtime, wanted, keep_alive, pin, listener, by_request)
        replica.listeners.append(listener)
        try:
            await replica.until_ready()
        finally:
            replica.listeners.remove(listener)
        info = self.info(replica)
        listener(
            Ready(
                replica=info.id,
                model=info.model,
                runtime=info.runtime,
                socket=info.socket,
                context=info.context,
                elapsed_s=time.monotonic() - began,
            )
        )
        return info

    def replicas(self) -> list[ReplicaInfo]:
        """Everything that is kept, oldest first."""
        return [self.info(r) for r in self._replicas.values()]

    def all(self) -> list[Replica]:
        """The replicas themselves, oldest first."""
        return list(self._replicas.values())

    def find(self, name: str) -> list[Replica]:
        """The replicas with this id, or of this model; NotFound when there is none."""
        if name in self._replicas:
            return [self._replicas[name]]
        found = [r for r in self._replicas.values() if name in (r.life.model.name, *r.life.model.names)]
        if not found:
            with contextlib.suppress(PierError):
                digest = self._store.get(name).digest
                found = [r for r in self._replicas.values() if r.life.model.digest == digest]
        if not found:
            raise NotFound(f"nothing runs as '{name}'", hint="`pier ps` lists what runs.")
        return found

    async def stop_replica(self, name: str, timeout: float | None = None) -> list[str]:
        """Drain and stop the replicas that ``name`` means; returns their ids once they are gone."""
        found = self.find(name)
        drain = self._settings.fleet.drain_timeout if timeout is None else timeout
        await asyncio.gather(*(self._stop(r, drain) for r in found))
        return [r.id for r in found]

    def info(self, replica: Replica) -> ReplicaInfo:
        return describe_replica(replica)

    def instance(self, replica: Replica) -> Instance:
        """The running program of ``replica``; NotFound while there is none."""
        if replica.instance is None:
            raise NotFound(f"{replica.life.model.name} is {replica.state} and has no program running")
        return replica.instance

    def activity(self, replica: str, open_requests: int, last_used: float) -> None:
        """Take in what the gateway saw of one replica."""
        found = self._replicas.get(replica)
        if found is not None:
            found.used(open_requests, last_used)

    def keep_loaded(self, model: str, seconds: float) -> None:
        """Let what runs as ``model`` stay for so long after its last request; at 0 it goes once it is idle."""
        with contextlib.suppress(NotFound):
            for replica in self.find(model):
                self._retime(replica, seconds, None)

    def gateway_lost(self) -> None:
        """The gateway is gone, and with it every request that was open."""
        for replica in self._replicas.values():
            replica.used(0, 0.0)

    def in_use(self, digest: str) -> bool:
        """Whether a replica of this model runs or will."""
        replica = self._current.get(digest)
        return replica is not None and replica.live

    @property
    def busy(self) -> bool:
        """Whether there is anything that a daemon must stay up for."""
        return any(r.state is not State.FAILED for r in self._replicas.values()) or self.chooser.building

    # --- starting -------------------------------------------------------------------------------------------------

    async def _take(
        self,
        record: ModelRecord,
        runtime: str | None,
        settings: dict[str, Any],
        keep_alive: float | None,
        pin: bool | None,
        listener: Listener,
        by_request: bool,
    ) -> Replica:
        """The live replica of this model that fits what is asked, or a new one that has begun to start."""
        while True:
            if self._closing:
                raise DaemonUnavailable("the daemon is shutting down", hint="Try again in a moment.")
            current = self._current.get(record.digest)
            if current is None or current.state in (State.STOPPED, State.FAILED):
                break
            if current.state in LEAVING:
                await current.until(lambda c=current: c.state is State.STOPPED)
                continue
            differs = current.differences(runtime, settings)
            if not differs:
                self._retime(current, keep_alive, pin)
                return current
            listener(Note(message=f"{record.name} runs with other settings ({', '.join(differs)}): restarting it"))
            await self._stop(current, self._settings.fleet.drain_timeout)
        if current is not None:
            self._cool(current, explicit=listener is not ignore and not by_request)
            self._forget(current)
        return self._begin(record, runtime, settings, keep_alive, bool(pin))

    def _begin(
        self, record: ModelRecord, runtime: str | None, settings: dict[str, Any], keep_alive: float | None, pin: bool
    ) -> Replica:
        life = self._life(records.new_id(), record, settings, runtime, keep_alive, pin)
        replica = Replica(life, self._admit, self._replica_changed)
        self._keep(replica)
        replica.start()
        return replica

    def _life(
        self,
        replica: str,
        record: ModelRecord,
        settings: dict[str, Any],
        runtime: str | None,
        keep_alive: float | None,
        pin: bool,
    ) -> Life:
        fleet = self._settings.fleet
        return Life(
            id=replica,
            model=record,
            settings=settings,
            runtime=runtime,
            keep_alive=fleet.keep_alive if keep_alive is None else keep_alive,
            pinned=pin,
            backoff=Backoff(fleet.backoff_initial, fleet.backoff_max, fleet.max_restarts),
            folder=self._dir / replica,
            start_timeout=fleet.start_timeout,
            withdrawn=self._withdrawn,
            parallel=self._planning.parallel(record, settings),
        )

    async def _admit(self, replica: Replica, refusal: PierError | None) -> tuple[Plan, str, Runtime]:
        """Find memory for a new replica, stopping idle ones for it, and choose where it runs."""
        self._planning.engine(replica.life.model)
        folder = await asyncio.to_thread(self._planning.hold, replica)
        async with self._admission:
            claims = [r.claim() for r in self._replicas.values() if r is not replica]
            reserve = self._settings.engine.memory_reserve
            decision = decide(claims, self._memory(), reserve, lambda free: self._planning.plan(replica, folder, free))
            for victim in decision.evict:
                evicted = self._replicas[victim]
                replica.emit(Note(message=f"stopping {evicted.life.model.name}, idle, to make room"))
                await self._stop(evicted, self._settings.fleet.drain_timeout)
            replica.plan = decision.plan
        name, runtime = await self.chooser.choose(replica.life.runtime, decision.plan.spec, replica.emit, refusal)
        return decision.plan, name, runtime

    def _cool(self, failed: Replica, *, explicit: bool) -> None:
        """A model that crashed again and again is not started by every request, but when a person asks."""
        if explicit or failed.state is not State.FAILED or not failed.restarts or failed.status.error is None:
            return
        if time.time() - failed.status.since < self._settings.fleet.backoff_max:
            raise failed.status.error

    async def _examine(self, name: str) -> None:
        replica = self._replicas.get(name)
        if replica is not None and replica.state is State.READY:
            await replica.examine()

    def _retime(self, replica: Replica, keep_alive: float | None, pin: bool | None) -> None:
        if keep_alive is not None:
            replica.life.keep_alive = keep_alive
        if pin is not None:
            replica.life.pinned = pin
        if keep_alive is not None or pin is not None:
            replica.save()
            self._arm()

    # --- ending ---------------------------------------------------------------------------------------------------

    async def _stop(self, replica: Replica, drain: float) -> None:
        await replica.stop(drain)

    def _forget(self, replica: Replica) -> None:
        self._drop(replica)
        self._changed()

    def _drop(self, replica: Replica) -> None:
        self._replicas.pop(replica.id, None)
        if self._current.get(replica.life.model.digest) is replica:
            del self._current[replica.life.model.digest]

    async def close(self, drain: bool) -> None:
        """End: with ``drain`` every replica is stopped; else what runs goes on, for the next daemon."""
        self._closing = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        await self.chooser.close()
        everything = list(self._replicas.values())
        if drain:
            timeout = self._settings.fleet.drain_timeout
            await asyncio.gather(*(self._stop(r, timeout) for r in everything))
        else:
            await asyncio.gather(*(self._leave(r) for r in everything))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _leave(self, replica: Replica) -> None:
        if replica.state in (State.STARTING, State.LOADING):
            await replica.until(lambda: replica.state not in COMING, 10.0)
        if replica.state is State.READY:
            await replica.detach()
        elif replica.state not in (State.STOPPED, State.FAILED):
            await replica.stop(0)

    # --- adoption -------------------------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Take over what an earlier daemon left running, and end what should not run."""
        try:
            for found in await adoption.find(self.chooser.runtimes, self._store, self._dir):
                await self._go_on(found)
            for owner in {o for owners in self._store.pinned().values() for o in owners} - set(self._replicas):
                self._store.unpin(owner)
        finally:
            self._adopted.set()
            self._replica_changed(None)

    async def _go_on(self, found: adoption.Found) -> None:
        if found.model.digest in self._current:
            await adoption.end(found.id, found.instance)
            return
        saved = found.saved
        life = self._life(found.id, found.model, saved.settings, None, saved.keep_alive, saved.pinned)
        life.lease.callback(self._store.unpin, found.id)
        kept = Replica(life, self._admit, self._replica_changed)
        self._keep(kept)
        kept.adopt(found.instance, found.runtime, saved)
        log.info("took over replica %s (%s)", found.id, found.model.name)

    # --- keeping --------------------------------------------------------------------------------------------------

    def _keep(self, replica: Replica) -> None:
        self._replicas[replica.id] = replica
        self._current[replica.life.model.digest] = replica

    def _replica_changed(self, replica: Replica | None) -> None:
        if replica is not None and replica.state is State.STOPPED:
            self._drop(replica)
        self._arm()
        self._changed()

    def _arm(self) -> None:
        """Set the one timer to the moment at which the next replica has been idle for long enough."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        due = [at for r in self._replicas.values() if (at := r.idle_at) is not None]
        if due and not self._closing:
            delay = max(0.0, min(due) - time.time())
            self._idle_timer = asyncio.get_running_loop().call_later(delay, self._unload_idle)

    def _unload_idle(self) -> None:
        now = time.time()
        for replica in list(self._replicas.values()):
            at = replica.idle_at
            if at is not None and at <= now:
                log.info("stopping replica %s (%s): idle", replica.id, replica.life.model.name)
                task = asyncio.create_task(self._stop(replica, self._settings.fleet.drain_timeout))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        self._arm()


async def _at_once() -> None:
    """Nobody sends requests."""
