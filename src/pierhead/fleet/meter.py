"""Reads what replicas truly use after their requests, corrects their claims with it, and remembers the peaks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

from pierhead.errors import PierError
from pierhead.fleet.peaks import Peaks, kind
from pierhead.fleet.replica import Replica
from pierhead.fleet.state import State
from pierhead.runtimes.family import below

_PAUSE = 2.0  # seconds between two readings of one replica, at least
_READ = frozenset({State.READY, State.SLEEPING})  # who sleeps may keep in the machine's memory what it had elsewhere


class Meter:
    """Reads each replica when it has become idle or asleep, and all of them every ``every`` seconds (0: never).

    Engines keep the memory that a request made them take, so a reading after it shows its peak. ``replicas`` are those
    that are kept, ``grown`` is called when claims have grown. ``uses`` tells what each process of the machine has in
    the memory of accelerators, and blocks.
    """

    def __init__(
        self,
        peaks: Peaks,
        every: float,
        replicas: Callable[[], Sequence[Replica]],
        grown: Callable[[], None],
        uses: Callable[[], dict[int, dict[str, int]]] = dict[int, dict[str, int]],
    ) -> None:
        self.peaks = peaks
        self._uses = uses
        self._every = every
        self._replicas = replicas
        self._grown = grown
        self._read_at: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def moved(self, replica: Replica) -> None:
        """Something about a replica has changed."""
        if replica.state is State.STOPPED:
            self._read_at.pop(replica.id, None)
            return
        if replica.state not in _READ or self._closed:
            return
        if self._timer is None and self._every > 0:
            self._timer = asyncio.get_running_loop().call_later(self._every, self._all)
        asleep = replica.state is State.SLEEPING
        if asleep or (not replica.open and time.monotonic() - self._read_at.get(replica.id, 0.0) >= _PAUSE):
            self._begin([replica])

    def close(self) -> list[asyncio.Task[None]]:
        """Read no more; what is under way."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        return list(self._tasks)

    def _all(self) -> None:
        self._timer = None
        ready = [r for r in self._replicas() if r.state in _READ]
        if ready and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(self._every, self._all)
            self._begin(ready)

    def _begin(self, replicas: Sequence[Replica]) -> None:
        for replica in replicas:
            self._read_at[replica.id] = time.monotonic()
        task = asyncio.create_task(self._read(replicas))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, replicas: Sequence[Replica]) -> None:
        news = grown = False
        devices = await self._on_devices(replicas)
        for replica in replicas:
            instance = replica.instance
            if instance is None or replica.plan is None:
                continue
            with contextlib.suppress(PierError):
                slept = replica.state is State.SLEEPING
                stats = await instance.stats()
                if stats.anonymous and slept is (replica.state is State.SLEEPING):
                    weights = min(stats.mapped, replica.life.model.size)
                    grown |= replica.measure(stats.anonymous, stats.anonymous + weights, devices.get(replica.id, {}))
                    digest, spec = replica.life.model.digest, replica.plan.spec
                    key, context = kind(digest, spec), replica.plan.context
                    most = max(replica.uses.device_peaks.values(), default=0)
                    news |= self.peaks.learn(key, replica.uses.peak, digest, spec.engine, context, most)
        if news:
            await asyncio.to_thread(self.peaks.save)
        if grown:
            self._grown()

    async def _on_devices(self, replicas: Sequence[Replica]) -> dict[str, dict[str, int]]:
        """What those of them that use accelerators have there, by replica and CDI name."""
        users = {r.id: pid for r in replicas if r.plan is not None and r.plan.devices and (pid := r.pid)}
        return await asyncio.to_thread(lambda: shares(users, self._uses())) if users else {}


def shares(users: Mapping[str, int], uses: Mapping[int, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """What the processes below each of the ``users`` have, added up by device."""
    found: dict[str, dict[str, int]] = {}
    for replica, pid in users.items():
        family = {pid, *(process.pid for process in below(pid))}
        mine = found.setdefault(replica, {})
        for one in family & uses.keys():
            for device, used in uses[one].items():
                mine[device] = mine.get(device, 0) + used
    return found
