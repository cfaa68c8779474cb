"""Whatever happens to replicas in whatever order, in the end as many run as are wanted, and nothing of the others."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pierhead.config import FleetSettings
from pierhead.errors import PierError
from pierhead.events import AnyEvent
from pierhead.fleet.memory import Memory

if TYPE_CHECKING:
    from tests.fleet.conftest import Yard

    from pierhead.fleet.replica import Replica
    from pierhead.fleet.supervisor import Supervisor

MIB = 1 << 20


class Weather:
    """One run: what may happen to a fleet, drawn by lot."""

    def __init__(self, yard: Yard, seed: int) -> None:
        self.yard = yard
        self.lot = random.Random(seed)
        self.pulse = asyncio.Event()
        self.callers: list[asyncio.Task[None]] = []
        self.room = self.lot.choice((250, 450, 1 << 30))
        yard.memory = Memory((512 + self.room) * MIB, (512 + self.room) * MIB)
        yard.fleet_settings = FleetSettings(backoff_initial=0.001, backoff_max=0.01, max_restarts=2, drain_timeout=0.05)

    async def open(self) -> None:
        self.fleet: Supervisor = await self.yard.open(changed=self.pulse.set)

    def any(self) -> Replica | None:
        return self.lot.choice(found) if (found := self.fleet.all()) else None

    def call(self, what: Callable[..., Any], *args: Any, **named: Any) -> None:
        async def calling() -> None:
            with contextlib.suppress(PierError):
                await what(*args, **named)

        self.callers.append(asyncio.create_task(calling()))

    async def happen(self) -> None:
        """One thing, and then a few turns of the loop."""
        ways = (self.ask, self.ask, self.ask, self.stop_one, self.stop_model, self.crash, self.crash)
        way = self.lot.choice((*ways, self.spoil, self.gate, self.use, self.use, self.next_daemon))
        found = way()
        if found is not None:
            await found
        for _ in range(self.lot.randint(0, 6)):
            await asyncio.sleep(0)

    def ask(self) -> None:
        def hear(event: AnyEvent) -> None: ...

        lot, named = self.lot, dict[str, Any](by_request=self.lot.random() < 0.5)
        if lot.random() < 0.6:
            named["replicas"] = lot.randint(1, 4)
        if lot.random() < 0.1:
            named["settings"] = {"context": lot.choice((256, 512))}
        if lot.random() < 0.5:
            named["listener"] = hear
        if lot.random() < 0.2 and (replica := self.any()):
            named["failed"] = replica.id
        self.call(self.fleet.ensure_ready, lot.choice("abc"), **named)

    def stop_one(self) -> None:
        if replica := self.any():
            self.call(self.fleet.stop_replica, replica.id)

    def stop_model(self) -> None:
        if replica := self.any():
            self.call(self.fleet.stop_replica, replica.life.model.name)

    def crash(self) -> None:
        if running := list(self.yard.process.running.values()):
            self.lot.choice(running).end()

    def spoil(self) -> None:
        self.yard.process.crashes += self.lot.randint(1, 4)

    def gate(self) -> None:
        loads = self.yard.process.loads
        (loads.clear if self.lot.random() < 0.5 else loads.set)()

    def use(self) -> None:
        if replica := self.any():
            self.fleet.activity(replica.id, self.lot.randint(0, 2), replica.ready_at + self.lot.random())

    async def next_daemon(self) -> None:
        self.yard.process.loads.set()
        await self.fleet.close(drain=False)
        await self.heard()
        self.yard.supervisors.remove(self.fleet)
        await self.open()

    async def heard(self) -> None:
        await asyncio.gather(*self.callers)
        self.callers.clear()

    async def calm(self) -> None:
        """Fair weather, until nothing changes any more."""
        self.yard.process.loads.set()
        self.yard.process.crashes = 0
        for replica in self.fleet.all():
            self.fleet.activity(replica.id, 0, 0)
        await self.heard()
        while any(r.leaving or r.state not in ("ready", "failed") for r in self.fleet.all()):
            self.pulse.clear()
            await self.pulse.wait()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets of toys that were cut short
@pytest.mark.parametrize("seed", range(40))
async def test_in_the_end_as_many_run_as_are_wanted_and_nothing_of_the_others(yard: Yard, seed: int) -> None:
    weather = Weather(yard, seed)
    async with asyncio.timeout(20):
        await weather.open()
        for _ in range(weather.lot.randint(5, 40)):
            await weather.happen()
        await weather.calm()
    gc.collect()  # what the toys left is told here, where it is expected
    found = weather.fleet.replicas()
    ready = {r.id for r in found if r.state == "ready"}
    assert set(yard.process.running) == ready
    assert set(yard.store.pins) == ready
    assert 100 * len(ready) <= weather.room
    for digest in {r.digest for r in found}:
        mine = [r for r in found if r.digest == digest]
        live = [r for r in mine if r.id in ready]
        assert len(live) <= mine[0].wanted
        assert len(live) == mine[0].wanted or len(live) < len(mine)
        assert len({(r.context, r.runtime, r.wanted) for r in live}) <= 1
