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
from pierhead.engines.base import Engine
from pierhead.engines.gpus import Device
from pierhead.errors import DaemonUnavailable, NotFound, UsageError
from pierhead.events import Listener, Note, Ready, ignore
from pierhead.fleet import adoption, compiled
from pierhead.fleet import record as records
from pierhead.fleet.adapters import Fitter
from pierhead.fleet.ask import Ask
from pierhead.fleet.choice import RuntimeChooser
from pierhead.fleet.group import Group
from pierhead.fleet.holdings import Models
from pierhead.fleet.info import ReplicaInfo, describe_replica
from pierhead.fleet.intent import Intent
from pierhead.fleet.layers import Layers, plain
from pierhead.fleet.life import Build, Life, builds_nothing
from pierhead.fleet.memory import Memory, limited, parse_size, read_memory
from pierhead.fleet.meter import Meter
from pierhead.fleet.peaks import Peaks
from pierhead.fleet.placing import Placing
from pierhead.fleet.planning import Planning, release, unpin
from pierhead.fleet.replica import Replica
from pierhead.fleet.roster import Roster
from pierhead.fleet.scheduler import Machine, limited_devices
from pierhead.fleet.state import COMING, Backoff, State
from pierhead.runtimes.base import Instance, Runtime
from pierhead.runtimes.gpu import NVML
from pierhead.store.model import ModelRecord

log = logging.getLogger(__name__)

_PATIENCE = 2.0  # seconds that a person waits to hear whether there is memory for a second replica


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
        devices: Callable[[], tuple[Device, ...]] = NVML.devices,
        uses: Callable[[], dict[int, dict[str, int]]] = NVML.uses,
        trusted: Callable[[ModelRecord], object] = lambda record: None,
        peaks: Path | None = None,
        layers: Layers | None = None,
        build: Build = builds_nothing,
    ) -> None:
        self._store = store
        self._peaks = Peaks(peaks or replicas_dir / "peaks.json")
        self.layers = layers or Layers(engines, plain(settings))
        adapters = replicas_dir.with_name("adapters")
        self._compiled = replicas_dir.with_name("compiled")
        self._planning = Planning(store, self.layers, trusted, settings.fleet, self._peaks, adapters, self._compiled)
        self._fitter = Fitter(self._planning.lend, self.layers, adapters)
        self._settings = settings
        self._build = build
        self._dir = replicas_dir
        budget, on_gpu = parse_size(settings.fleet.memory_budget), parse_size(settings.fleet.gpu_budget)
        self._devices = devices
        self._withdrawn = withdrawn or _at_once
        self.chooser = RuntimeChooser(runtimes, settings.runtime.default, gpus=lambda: bool(devices()))
        self._roster = Roster(store, settings.fleet, self._make, changed)
        self._placing = Placing(
            settings,
            self._planning,
            self._fitter,
            self.chooser,
            self._roster,
            lambda: Machine(limited(memory(), budget), limited_devices(devices(), on_gpu)),
        )
        self._meter = Meter(self._peaks, settings.fleet.measure, self.all, self._placing.restore, uses)
        self._adopted = asyncio.Event()
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
        replicas: int | None = None,
        failed: str = "",
        listener: Listener = ignore,
        by_request: bool = False,
    ) -> ReplicaInfo:
        """Return once a replica of ``model`` answers; callers for one model share one start, and more start behind it.

        ``settings`` and ``runtime`` that differ from those of what runs restart it; ``replicas`` adds or drains some.
        ``failed`` names a replica that the caller saw break: it is examined first. ``by_request``: a client's request
        asks, and no person. Raises NotFound, OutOfMemory, EngineFailed with the engine's last lines, and what a runtime
        raises.
        """
        began = time.monotonic()
        await self._adopted.wait()
        record = self._store.get(model)
        self.chooser.check(runtime)
        wanted = self._planning.asked(record, settings)
        ask = Ask(record, runtime, wanted, keep_alive, pin, replicas, listener, by_request)
        ask.check()
        if failed:
            await self._examine(failed)
        group = await self._take(ask)
        group.listeners.append(listener)
        try:
            replica = await group.until_ready()
            await group.tell_missing(listener, _PATIENCE if ask.explicit else 0.0)
        finally:
            group.listeners.remove(listener)
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
        return [self.info(r) for r in self.all()]

    def all(self) -> list[Replica]:
        """The replicas themselves, oldest first."""
        return list(self._roster.replicas.values())

    def find(self, name: str) -> list[Replica]:
        """The replicas with this id, or of this model; NotFound when there is none."""
        return self._roster.find(name)

    async def stop_replica(self, name: str, timeout: float | None = None) -> list[str]:
        """Drain and stop the replicas that ``name`` means; returns their ids once they are gone.

        One that is named by its id is not replaced: its model keeps one less (see ``kept``), and ends with its last.
        """
        found = self.find(name)
        drain = self._settings.fleet.drain_timeout if timeout is None else timeout
        fresh = [r for r in found if not r.leaving]
        ending = [r.leave(drain) for r in found]
        for group in self._roster.groups_of(fresh):
            self._roster.keep_fewer(group, sum(r in group.members for r in fresh))
        await asyncio.shield(asyncio.gather(*ending))
        return [r.id for r in found]

    def kept(self, model: ModelRecord) -> int:
        """How many replicas of this model are kept; 0 when it does not run."""
        group = self._roster.groups.get(model.digest)
        return group.intent.replicas if group is not None and group.live else 0

    def asked(self, model: ModelRecord) -> Mapping[str, Any]:
        """The settings that were asked for of what runs; empty when it does not."""
        group = self._roster.groups.get(model.digest)
        return group.intent.settings if group is not None and group.live else {}

    def info(self, replica: Replica) -> ReplicaInfo:
        group = self._roster.group(replica)
        return describe_replica(replica, group.idle_at if group is not None else None)

    def capabilities(self, record: ModelRecord) -> tuple[str, ...]:
        """What a model can do, by the engine that would serve it; empty where none does."""
        return self._planning.capabilities(record)

    def instance(self, replica: Replica) -> Instance:
        """The running program of ``replica``; NotFound while there is none."""
        if replica.instance is None:
            raise NotFound(f"{replica.life.model.name} is {replica.state} and has no program running")
        return replica.instance

    def activity(self, replica: str, open_requests: int, last_used: float) -> None:
        """Take in what the gateway saw of one replica."""
        found = self._roster.replicas.get(replica)
        if found is not None:
            found.used(open_requests, last_used)

    def keep_loaded(self, model: str, seconds: float) -> None:
        """Let what runs as ``model`` stay for so long after its last request; at 0 it goes once it is idle."""
        with contextlib.suppress(NotFound):
            for group in self._roster.groups_of(self.find(model)):
                self._roster.keep(group, keep_alive=seconds)

    def gateway_lost(self) -> None:
        """The gateway is gone, and with it every request that was open."""
        for replica in self.all():
            replica.used(0, 0.0)

    def in_use(self, digest: str) -> bool:
        """Whether a replica of this model runs or will."""
        group = self._roster.groups.get(digest)
        return group is not None and bool(group.live)

    def pending(self, model: ModelRecord) -> tuple[str, ...]:
        """The names of settings which what runs of a model was not started with, and the next start will have."""
        group = self._roster.groups.get(model.digest)
        before = next((m.life.wish for m in group.live if m.life.wish is not None), None) if group is not None else None
        if group is None or before is None:
            return ()
        try:
            now = self._planning.wish(model, group.intent.settings)
        except UsageError:
            return ()  # which is told when it starts
        return now.differences(before)

    async def refit(self, digest: str) -> None:
        """Give what runs of a model the LoRA adapters that its settings name now, where its engine can."""
        group = self._roster.groups.get(digest)
        for replica in group.ready if group is not None else ():
            await self._fitter.fit(replica)

    @property
    def waiting(self) -> int:
        """How many starts wait for memory."""
        return self._placing.waiting

    @property
    def busy(self) -> bool:
        """Whether there is anything that a daemon must stay up for."""
        return any(r.state is not State.FAILED for r in self.all()) or self.chooser.building

    # --- starting -------------------------------------------------------------------------------------------------

    async def _take(self, ask: Ask) -> Group:
        """The replicas of this model, one of which answers or will, kept as is asked."""
        model, replicas = ask.model, 0
        while True:
            if self._closing:
                raise DaemonUnavailable("the daemon is shutting down", hint="Try again in a moment.")
            group = self._roster.groups.get(model.digest)
            if group is None:
                group = self._roster.open(model, ask.intent(self.layers.keeping(model), replicas, time.time()))
                self._roster.begin(group)
                return group
            if not group.live:
                replicas = replicas or group.intent.replicas
                self._clear(group, ask)
                await group.until(lambda g=group: not g.members or bool(g.staying))
                continue
            differs = group.differences(ask.runtime, ask.settings)
            if not differs:
                if group.failed and (ask.explicit or group.starved):
                    self._roster.again(group)
                self._roster.keep(group, replicas=ask.replicas, keep_alive=ask.keep_alive, pin=ask.pin)
                for replica in group.staying:
                    replica.wake()
                return group
            await self._placing.try_out(self._replica(group, ask.intent(self.layers.keeping(model), 0, 0.0)), group)
            if self._roster.groups.get(model.digest) is not group or not group.live:
                continue  # it has ended meanwhile
            ask.listener(Note(message=f"{model.name} runs with other settings ({', '.join(differs)}): restarting it"))
            replicas = group.intent.replicas
            await self._roster.end(group)

    def _clear(self, group: Group, ask: Ask) -> None:
        """Make way for a new start of a model of which nothing lives any more."""
        failed = group.failed
        if failed:
            self._cool(failed[-1], explicit=ask.explicit)
        for replica in failed:
            self._roster.drop(replica)

    def _make(self, group: Group, name: str = "") -> Replica:
        """A new replica of the group's model that has not begun."""
        replica = self._replica(group, group.intent, name)
        self._roster.add(group, replica)
        return replica

    def _replica(self, group: Group, intent: Intent, name: str = "") -> Replica:
        """One that nobody knows of yet."""
        fleet, name = self._settings.fleet, name or records.new_id()
        life = Life(
            id=name,
            model=group.model,
            intent=intent,
            listeners=group.listeners,
            backoff=Backoff(fleet.backoff_initial, fleet.backoff_max, fleet.max_restarts),
            folder=self._dir / name,
            start_timeout=fleet.start_timeout,
            withdrawn=self._withdrawn,
            adapt=self._fitter.fit,
            readmit=self._placing.readmit,
            spare=bool(group.live),
            build=self._build,
        )
        return Replica(life, self._placing.admit, self._moved)

    def _moved(self, replica: Replica) -> None:
        self._roster.moved(replica)
        self._meter.moved(replica)
        self._placing.look()

    def _cool(self, failed: Replica, *, explicit: bool) -> None:
        """A model that crashed again and again is not started by every request, but when a person asks."""
        if explicit or failed.state is not State.FAILED or not failed.restarts or failed.status.error is None:
            return
        if time.time() - failed.status.since < self._settings.fleet.backoff_max:
            raise failed.status.error

    async def _examine(self, name: str) -> None:
        replica = self._roster.replicas.get(name)
        if replica is not None and replica.state is State.READY:
            await replica.examine()

    # --- ending ---------------------------------------------------------------------------------------------------

    async def close(self, drain: bool) -> None:
        """End: with ``drain`` every replica is stopped; else what runs goes on, for the next daemon."""
        self._closing = True
        self._roster.close()
        self._placing.close()
        await asyncio.gather(*self._meter.close(), return_exceptions=True)
        await self.chooser.close()
        everything = self.all()
        if drain:
            timeout = self._settings.fleet.drain_timeout
            await asyncio.gather(*(r.stop(timeout) for r in everything))
        else:
            await asyncio.gather(*(self._leave(r) for r in everything))

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
            await asyncio.to_thread(self._devices)  # the first look takes its time
            found = await adoption.find(self.chooser.runtimes, self._store, self._dir)
            for one in sorted(found, key=lambda f: (-f.saved.asked, f.saved.started)):
                await self._go_on(one)
            release(self._store, set(self._roster.replicas))
            await asyncio.to_thread(self._fitter.tidy, set(self._roster.replicas))
            await asyncio.to_thread(compiled.tidy, self._compiled, self._store.get)
        finally:
            self._adopted.set()
            self._roster.settle()

    async def _go_on(self, found: adoption.Found) -> None:
        saved, model = found.saved, found.model
        group = self._roster.groups.get(model.digest) or self._roster.open(model, saved.intent())
        if group.intent.settings != saved.settings:  # it was about to end, when the others were started anew
            await adoption.end(found.id, found.instance)
            return
        kept = self._make(group, found.id)
        kept.life.wish = saved.wish
        if saved.wish is not None:
            kept.life.parallel = saved.parallel or self._planning.parallel(model, saved.wish)
        kept.life.lease.callback(unpin, self._store, found.id)
        kept.adopt(found.instance, found.runtime, saved)
        self._fitter.prepare(kept)
        log.info("took over replica %s (%s)", found.id, model.name)


async def _at_once() -> None:
    """Nobody sends requests."""
