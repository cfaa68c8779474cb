"""Who runs: all replicas, each model's kept at the number wanted and unloaded when idle; finds no memory for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from pierhead.config import FleetSettings
from pierhead.errors import NotFound, PierError
from pierhead.fleet.group import Group
from pierhead.fleet.holdings import Models
from pierhead.fleet.intent import Intent
from pierhead.fleet.replica import Replica
from pierhead.fleet.state import State
from pierhead.store.model import ModelRecord

log = logging.getLogger(__name__)

_AGAIN = 30.0  # seconds after which what failed is tried again while others of its model answer


class Roster:
    """Replicas by id and by model. ``make`` gives a group one more replica, and ``changed`` hears of every change.

    Nothing is started or ended by itself before ``settle`` and after ``close``.
    """

    def __init__(
        self,
        store: Models,
        settings: FleetSettings,
        make: Callable[[Group], Replica],
        changed: Callable[[], None],
    ) -> None:
        self._store = store
        self._settings = settings
        self._make = make
        self._changed = changed
        self._timer: asyncio.TimerHandle | None = None
        self._acting = False
        self.replicas: dict[str, Replica] = {}
        self.groups: dict[str, Group] = {}  # by model digest

    # --- who is there ---------------------------------------------------------------------------------------------

    def find(self, name: str) -> list[Replica]:
        """The replicas with this id, or of this model; NotFound when there is none."""
        if name in self.replicas:
            return [self.replicas[name]]
        found = [r for r in self.replicas.values() if name in (r.life.model.name, *r.life.model.names)]
        if not found:
            with contextlib.suppress(PierError):
                digest = self._store.get(name).digest
                found = [r for r in self.replicas.values() if r.life.model.digest == digest]
        if not found:
            raise NotFound(f"nothing runs as '{name}'", hint="`pier ps` lists what runs.")
        return found

    def group(self, replica: Replica) -> Group | None:
        """The replicas of the same model."""
        return self.groups.get(replica.life.model.digest)

    def groups_of(self, replicas: Sequence[Replica]) -> list[Group]:
        """The models of these replicas, each once."""
        return [g for digest, g in self.groups.items() if any(r.life.model.digest == digest for r in replicas)]

    def open(self, model: ModelRecord, intent: Intent) -> Group:
        """Begin to keep a model; it has no replica yet."""
        group = self.groups[model.digest] = Group(model, intent)
        return group

    def add(self, group: Group, replica: Replica) -> None:
        """Take a new replica in."""
        self.replicas[replica.id] = replica
        group.members.append(replica)

    def drop(self, replica: Replica) -> None:
        """Forget one that is gone; with its last replica a model is not kept any more."""
        self.replicas.pop(replica.id, None)
        group = self.group(replica)
        if group is not None and replica in group.members:
            group.members.remove(replica)
            if not group.members:
                del self.groups[group.model.digest]
            group.signal()
        self._changed()

    # --- how many -------------------------------------------------------------------------------------------------

    def begin(self, group: Group) -> None:
        """Start one more replica."""
        self._make(group).start()

    def tend(self, group: Group) -> None:
        """Start or drain what is missing or too much."""
        if not self._acting:
            return
        change = group.change
        for name in change.stop:
            self.replicas[name].leave(self._settings.drain_timeout)
        if change.start:
            self.begin(group)

    def keep(
        self, group: Group, *, replicas: int | None = None, keep_alive: float | None = None, pin: bool | None = None
    ) -> None:
        """Keep a model in another way from now on; None leaves it as it is."""
        intent = group.intent
        before = (intent.replicas, intent.keep_alive, intent.pinned)
        intent.replicas = intent.replicas if replicas is None else replicas
        intent.keep_alive = intent.keep_alive if keep_alive is None else keep_alive
        intent.pinned = intent.pinned if pin is None else pin
        if (intent.replicas, intent.keep_alive, intent.pinned) != before:
            intent.asked = time.time()
            self._save(group)
        self.tend(group)
        self._arm()

    def keep_fewer(self, group: Group, ended: int) -> None:
        """So many were ended by hand: they and the failed ones are not replaced; with none left the model ends."""
        left = max(1, group.intent.replicas - ended - len(group.failed)) if group.live else 0
        self.keep(group, replicas=left)

    async def end(self, group: Group) -> None:
        """Drain and stop all replicas of a model."""
        group.intent.replicas = 0
        ending = [m.leave(self._settings.drain_timeout) for m in group.members]
        await asyncio.shield(asyncio.gather(*ending))

    def evict(self, names: Sequence[str], drain: float, tell: Callable[[Replica], None]) -> None:
        """Begin to stop idle replicas that another needs the memory of; a request that was quicker is finished."""
        for group in self.groups.values():
            if group.live and all(m.id in names for m in group.live):
                group.intent.replicas = 0  # it goes as a whole: nothing of it is started again
        victims = [self.replicas[name] for name in names if name in self.replicas]
        for victim in victims:
            tell(victim)
            victim.leave(drain)

    def again(self, group: Group) -> None:
        """Give those a new start that failed while others of their model live."""
        for replica in group.failed:
            self.drop(replica)
        self.tend(group)

    def _save(self, group: Group) -> None:
        for replica in group.staying:
            replica.save()

    # --- what happens ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """What an earlier daemon left is known: act from now on."""
        self._acting = True
        for group in list(self.groups.values()):
            self._save(group)
            self.tend(group)
        self._arm()
        self._changed()

    def close(self) -> None:
        """Start nothing more, and end nothing for being idle."""
        self._acting = False
        self._arm()

    def moved(self, replica: Replica) -> None:
        """Something about a replica has changed."""
        group = self.group(replica)
        if replica.state is State.STOPPED:
            self.drop(replica)
        if group is not None:
            group.signal()
            if group.members:
                self.tend(group)
        if replica.state in (State.STOPPED, State.FAILED) and replica.plan is not None:
            self._freed()
        self._arm()
        self._changed()

    def _freed(self) -> None:
        """Memory was given back: models that lack replicas for want of it try again."""
        for group in list(self.groups.values()):
            if group.starved:
                self.again(group)

    def _arm(self) -> None:
        """Set the one timer to the moment at which the next model is idle, or may try again what failed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = [at for g in self.groups.values() for at in (g.idle_at, self._again_at(g)) if at is not None]
        if due and self._acting:
            delay = max(0.0, min(due) - time.time())
            self._timer = asyncio.get_running_loop().call_later(delay, self._due)

    def _again_at(self, group: Group) -> float | None:
        """Unix time at which what failed of a model that answers is tried again."""
        if not group.live or not group.failed:
            return None
        return group.failed[-1].status.since + max(_AGAIN, self._settings.backoff_max)

    def _unload(self, group: Group) -> None:
        """An idle model goes to sleep where its engine can, else it ends."""
        if self._settings.sleep and group.ready and all(m.sleeps for m in group.ready):
            log.info("putting %s to sleep: idle", group.model.name)
            for replica in group.ready:
                replica.rest(self._settings.drain_timeout)
            return
        log.info("stopping %s: idle", group.model.name)
        self.keep(group, replicas=0)

    def _due(self) -> None:
        now = time.time()
        for group in list(self.groups.values()):
            idle, again = group.idle_at, self._again_at(group)
            if idle is not None and idle <= now:
                self._unload(group)
            elif again is not None and again <= now:
                self.again(group)
        self._arm()
