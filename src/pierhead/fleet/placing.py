"""Finds memory for replicas that start or wake, stopping idle ones for it, and says where they run; starts none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from pierhead.config import Settings
from pierhead.engines import gpus
from pierhead.engines.base import Plan
from pierhead.errors import PierError
from pierhead.events import Note
from pierhead.fleet import compiled
from pierhead.fleet.adapters import Fitter
from pierhead.fleet.admission import Admission, Ticket
from pierhead.fleet.choice import RuntimeChooser
from pierhead.fleet.group import Group
from pierhead.fleet.planning import Planning
from pierhead.fleet.replica import Replica
from pierhead.fleet.roster import Roster
from pierhead.fleet.scheduler import Claim, Decision, Machine, Room, decide, free_room, overdrawn
from pierhead.fleet.state import State
from pierhead.fleet.warm import read_ahead
from pierhead.runtimes.base import Runtime

log = logging.getLogger(__name__)


class Placing:
    """The queue for memory, with what its tickets mean for replicas; ``machine`` tells what there is now."""

    def __init__(
        self,
        settings: Settings,
        planning: Planning,
        fitter: Fitter,
        chooser: RuntimeChooser,
        roster: Roster,
        machine: Callable[[], Machine],
    ) -> None:
        self._settings = settings
        self._planning = planning
        self._fitter = fitter
        self._chooser = chooser
        self._roster = roster
        self._machine = machine
        self._admission = Admission(self._claims, machine, settings.engine.memory_reserve, self._make_room)

    @property
    def waiting(self) -> int:
        """How many starts wait for memory."""
        return self._admission.waiting

    def look(self) -> None:
        """Something has changed: see soon whose turn it is."""
        self._admission.look()

    def close(self) -> None:
        """Look no more."""
        self._admission.close()

    async def admit(self, replica: Replica, refusal: PierError | None) -> tuple[Plan, str, Runtime]:
        """Find memory for a replica, stopping idle ones for it, and choose where it runs: as others of its model do."""
        life = replica.life
        group = self._roster.group(replica)
        if replica.plan is None:
            twin = group.twin(replica) if group is not None else None
            first = twin.life.wish if twin is not None else None
            planning, asked = self._planning, life.intent.settings
            life.wish = planning.like(life.model, first) if first else planning.wish(life.model, asked)
            life.parallel = self._planning.parallel(life.model, life.wish)
            folder = await asyncio.to_thread(self._planning.hold, replica)
            twin = group.twin(replica) if group is not None else None
            plan = await self._admission.admit(self._ticket(replica, folder, twin.plan if twin is not None else None))
            life.parallel = plan.parallel or life.parallel
        else:  # the runtime before could not start it: its memory is promised already
            plan = replica.plan
        twin = group.twin(replica) if group is not None else None
        asked = twin.runtime_name if twin is not None else life.intent.runtime
        name, runtime = await self._chooser.choose(asked, plan.spec, replica.emit, refusal)
        return plan, name, runtime

    async def try_out(self, trial: Replica, instead_of: Group) -> None:
        """Raise what would keep a replica from starting ``instead_of`` those that run; it is not started."""
        life = trial.life
        life.wish = self._planning.wish(life.model, life.intent.settings)
        try:
            folder = await asyncio.to_thread(self._planning.hold, trial)
            ticket = self._ticket(trial, folder, None)
            gone = {member.id for member in instead_of.members}
            others = [c for c in self._claims() if c.replica not in gone]
            outcome = decide(
                others, self._machine(), self._settings.engine.memory_reserve, ticket.plan, smaller=ticket.smaller
            )
            if isinstance(outcome, Decision):
                self._chooser.check_gpus(life.intent.runtime, outcome.plan.spec)
        finally:
            life.lease.close()

    async def readmit(self, replica: Replica) -> None:
        """Find room on its accelerators for one that wakes; what it keeps there while it sleeps it has."""
        plan = replica.plan
        if plan is None or not plan.devices:
            return
        uses = replica.uses
        more = {d: max(0, n - uses.devices.get(d, 0)) for d, n in uses.on_devices(plan, sleeping=False).items()}
        wanted = msgspec.structs.replace(plan, memory=0, devices=more)

        def fits(room: Room) -> Plan:
            gpus.check(replica.life.model.name, room.devices, more)
            return wanted

        def place(plan: Plan) -> None:
            replica.rising = True

        await self._admission.admit(
            Ticket(
                replica=replica.id,
                plan=fits,
                smaller=None,
                evict=True,
                place=place,
                tell=lambda text: replica.emit(Note(message=text)),
                patience=self._settings.fleet.memory_wait,
            )
        )

    def _ticket(self, replica: Replica, folder: Path, like: Plan | None) -> Ticket:
        fleet, planning = self._settings.fleet, self._planning
        whole = planning.whole(replica, folder, like, self._machine().devices)

        weights = [folder / f.name for f in replica.life.model.laid_out if f.role in ("weights", "mmproj", "draft")]

        def place(plan: Plan) -> None:
            replica.plan = plan
            self._fitter.prepare(replica)
            compiled.prepare(plan.spec)
            asyncio.get_running_loop().run_in_executor(None, read_ahead, weights)  # others may still be ending

        def smaller(room: Room) -> Plan:
            plan = planning.smaller(replica, folder, room, like)
            told = f"memory is short: it starts with a context of {plan.context:,} tokens"
            return plan if like else msgspec.structs.replace(plan, notes=(*plan.notes, told))

        return Ticket(
            replica=replica.id,
            plan=whole,
            smaller=smaller if fleet.shrink != "never" else None,
            evict=not replica.life.spare,
            place=place,
            tell=lambda text: replica.emit(Note(message=text)),
            patience=fleet.memory_wait,
        )

    def _claims(self) -> list[Claim]:
        """The ledger."""
        return [r.claim() for r in self._roster.replicas.values()]

    def _make_room(self, names: Sequence[str], ticket: Ticket) -> None:
        """Begin to end idle replicas for one that wants their memory; those that can and may instead fall asleep."""
        asking, replicas = self._roster.replicas.get(ticket.replica), self._roster.replicas
        drain = self._settings.gateway.request_timeout
        resting = [r for name in names if (r := replicas.get(name)) is not None and self._may_rest(r, ticket)]

        def tell(victim: Replica) -> None:
            if asking is not None:
                what = "putting {} to sleep" if victim in resting else "stopping {}"
                asking.emit(Note(message=f"{what.format(victim.life.model.name)}, idle, to make room"))

        for victim in resting:
            tell(victim)
            victim.rest(drain)
        self._roster.evict([name for name in names if replicas.get(name) not in resting], drain, tell)

    def _may_rest(self, victim: Replica, ticket: Ticket) -> bool:
        """Whether sleep is enough: it is an accelerator that is full, and the machine's own memory has room."""
        if not self._can_rest(victim) or ticket.placed is None or not ticket.placed.devices:
            return False
        claims = [c for c in self._claims() if c.replica != ticket.replica]
        room = free_room(self._machine(), claims, self._settings.engine.memory_reserve)
        return room.memory >= ticket.placed.memory

    def restore(self) -> None:
        """Replicas use more than they had claimed: idle ones leave until all claims fit again, or fall asleep."""
        claims, machine, reserve = self._claims(), self._machine(), self._settings.engine.memory_reserve
        names = overdrawn(claims, machine, reserve)
        if not names:
            return
        log.warning("replicas use more memory than was estimated: %s, idle, make room", ", ".join(names))
        leaving, drain = overdrawn(claims, Machine(machine.memory), reserve), self._settings.gateway.request_timeout
        replicas = self._roster.replicas
        resting = [name for name in names if name not in leaving and self._can_rest(replicas[name])]
        for name in resting:
            replicas[name].rest(drain)
        self._roster.evict([name for name in names if name not in resting], drain, lambda victim: None)

    def _can_rest(self, replica: Replica) -> bool:
        """Whether it can let go of an accelerator now, and may."""
        awake = replica.state is State.READY and bool(replica.claim().devices)
        return self._settings.fleet.sleep and replica.sleeps and awake
