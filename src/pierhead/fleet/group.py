"""The replicas of one model, seen as one: who is there, who answers, and waiting for that; starts nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from pierhead.errors import EngineFailed, OutOfMemory
from pierhead.events import Listener, Note
from pierhead.fleet.intent import Change, Intent, change, idle_at
from pierhead.fleet.replica import Replica
from pierhead.fleet.state import State
from pierhead.store.model import ModelRecord


class Group:
    """All replicas of ``model``, oldest first, with how they are kept and who is told of their starts."""

    def __init__(self, model: ModelRecord, intent: Intent) -> None:
        self.model = model
        self.intent = intent
        self.members: list[Replica] = []
        self.listeners: list[Listener] = []
        self._pulse = asyncio.Event()

    # --- who is there ---------------------------------------------------------------------------------------------

    @property
    def staying(self) -> list[Replica]:
        """Those that nobody is ending, the failed among them."""
        return [m for m in self.members if not m.leaving]

    @property
    def live(self) -> list[Replica]:
        """Those that answer or will."""
        return [m for m in self.staying if m.live]

    @property
    def ready(self) -> list[Replica]:
        """Those that answer, the least busy first."""
        return sorted((m for m in self.staying if m.state is State.READY), key=lambda m: m.open)

    @property
    def failed(self) -> list[Replica]:
        """Those that could not start, or crashed too often; the latest last."""
        return sorted((m for m in self.staying if m.state is State.FAILED), key=lambda m: m.status.since)

    @property
    def starved(self) -> bool:
        """Whether it answers with fewer replicas than wanted for lack of memory."""
        return bool(self.live) and any(isinstance(m.status.error, OutOfMemory) for m in self.failed)

    @property
    def idle_at(self) -> float | None:
        """Unix time at which all of it may be stopped (see ``intent.idle_at``)."""
        return idle_at([m.claim() for m in self.staying], self.intent.keep_alive)

    @property
    def change(self) -> Change:
        """What to start and to stop now."""
        return change([m.claim() for m in self.staying], self.intent.replicas)

    def twin(self, replica: Replica) -> Replica | None:
        """Another live member that has its place, which ``replica`` must be like."""
        return next((m for m in self.live if m is not replica and m.plan is not None and m.runtime_name), None)

    def differences(self, runtime: str | None, settings: Mapping[str, Any]) -> list[str]:
        """The names of what is asked for and is not what runs."""
        return self.live[0].differences(runtime, settings)

    # --- waiting --------------------------------------------------------------------------------------------------

    def signal(self) -> None:
        """Something about a member has changed."""
        pulse, self._pulse = self._pulse, asyncio.Event()
        pulse.set()

    async def until(self, reached: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until ``reached()`` holds, looked at after every change; False when ``timeout`` seconds passed."""
        try:
            async with asyncio.timeout(timeout):
                while not reached():
                    await self._pulse.wait()
        except TimeoutError:
            return False
        return True

    async def until_ready(self) -> Replica:
        """One that answers, as soon as there is any; raises the error that ended the last one that could."""
        await self.until(lambda: bool(self.ready) or not any(m.coming for m in self.staying))
        if self.ready:
            return self.ready[0]
        errors = [m.status.error for m in self.failed if m.status.error is not None]
        raise (
            errors[-1]
            if errors
            else EngineFailed(f"{self.model.name} was stopped while it was starting", hint="Try again.")
        )

    async def tell_missing(self, listener: Listener, patience: float) -> None:
        """Tell it when fewer replicas run than wanted, and why; the next one gets a moment to find its memory."""
        if patience:
            await self.until(lambda: not any(m.state is State.CREATED for m in self.staying), patience)
        if self.failed and self.live and (error := self.failed[-1].status.error) is not None:
            text = f"{self.model.name} runs {len(self.live)} of {self.intent.replicas} replicas: {error.message}"
            listener(Note(message=text, level="warning"))
