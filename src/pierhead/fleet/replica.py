"""One replica from its start to its end: the state machine applied to a runtime; knows no other replica."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from pierhead.engines.base import Adapter, LaunchSpec, Plan
from pierhead.errors import EngineFailed, PierError
from pierhead.events import AnyEvent, Note, Phase
from pierhead.fleet import record as records
from pierhead.fleet.ending import drained, finish
from pierhead.fleet.life import Admit, Life
from pierhead.fleet.scheduler import Claim
from pierhead.fleet.state import COMING, LEAVING, IllegalTransition, State, Status
from pierhead.fleet.uses import Uses
from pierhead.runtimes.base import Instance, Runtime
from pierhead.runtimes.readiness import failure, healthy, wait_ready

log = logging.getLogger(__name__)

NOTHING: Mapping[str, int] = {}
SETTLED = 5.0  # seconds in which the request that a replica was started for reaches it; it does not leave before


class Replica:
    """Runs one replica in a task of its own; ``changed`` is called after each change that others may care about."""

    def __init__(self, life: Life, admit: Admit, changed: Callable[[Replica], None]) -> None:
        self.life = life
        self.id = life.id
        self.status = Status(State.CREATED, time.time())
        self.plan: Plan | None = None
        self.runtime_name = ""
        self.instance: Instance | None = None
        self.adapters: tuple[Adapter, ...] = ()  # LoRAs that were loaded after its start
        self.refused: dict[str, str] = {}  # and why others could not be
        self.started = time.time()
        self.ready_s = 0.0
        self.ready_at = 0.0
        self.restarts = 0
        self.ended: EngineFailed | None = None  # how the program before this one did
        self.open = 0
        self.last_used = 0.0
        self.gone = False  # its program has ended and nothing of it is left in memory
        self.uses = Uses()
        self._runtime: Runtime | None = None
        self._admit = admit
        self._changed = changed
        self._began = time.monotonic()
        self._pulse = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._counted = 0
        self._resting: asyncio.Task[None] | None = None
        self.rising = False  # it sleeps and was promised its accelerators' memory
        self._wanted = False  # somebody asked for it while it was asleep
        self._restless = False

    # --- seen from outside ----------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self.status.state

    @property
    def live(self) -> bool:
        """Whether it answers or will."""
        return self.state in (State.READY, State.DOZING, State.SLEEPING) or self.state in COMING

    @property
    def leaving(self) -> bool:
        """Whether somebody has begun to end it."""
        return self._ending is not None or self.state in LEAVING

    @property
    def coming(self) -> bool:
        """Whether it will answer, unless something goes wrong."""
        return self.state in COMING or (self._wanted and self.state in (State.DOZING, State.SLEEPING))

    def emit(self, event: AnyEvent) -> None:
        """Tell everyone who waits for this replica."""
        for listener in list(self.life.listeners):
            listener(event)

    def used(self, open_requests: int, last_used: float) -> None:
        """Note what the gateway saw."""
        was = self.open
        self.open = open_requests
        self.last_used = max(self.last_used, last_used)
        if was != open_requests or last_used:
            self._signal()

    @property
    def pid(self) -> int | None:
        """The process that its program is below; None where there is none, or nobody can tell."""
        pid = getattr(self.instance, "pid", None)
        return pid if isinstance(pid, int) else None

    def measure(self, anonymous: int, used: int, devices: Mapping[str, int] = NOTHING) -> bool:
        """Note what it was seen to use; True when that is more than it had claimed."""
        before = self.claim()
        self.uses.note(anonymous, used, devices, sleeping=self.state is State.SLEEPING)
        now = self.claim()
        return now.memory > before.memory or any(n > before.devices.get(d, 0) for d, n in now.devices.items())

    async def until(self, reached: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until ``reached()`` holds, looked at after every change; False when ``timeout`` seconds passed."""
        try:
            async with asyncio.timeout(timeout):
                while not reached():
                    await self._pulse.wait()
        except TimeoutError:
            return False
        return True

    def claim(self) -> Claim:
        """Its line in the ledger of memory."""
        plan, asleep = None if self.gone else self.plan, self.state is State.SLEEPING
        return Claim(
            replica=self.id,
            model=self.life.model.name,
            memory=0 if plan is None else max(plan.memory, self.uses.peak),
            state=State.LOADING if self.rising else self.state,
            open=self.open,
            pinned=self.life.intent.pinned,
            last_used=max(self.last_used, self.ready_at),
            ready_at=self.ready_at,
            measured=0 if self.gone else self.uses.anonymous(sleeping=asleep),
            weights=self.life.model.size,
            settled=self.last_used > self.ready_at or time.time() - self.ready_at > SETTLED,
            devices={} if plan is None else self.uses.on_devices(plan, sleeping=asleep and not self.rising),
            read={} if self.gone else self.uses.devices,
        )

    def differences(self, runtime: str | None, settings: Mapping[str, Any]) -> list[str]:
        """The names of what is asked for and is not what runs."""
        found = [key for key, value in settings.items() if self.life.intent.settings.get(key) != value]
        running = self.runtime_name or self.life.intent.runtime
        if runtime not in (None, "auto") and running is not None and runtime != running:
            found.append("runtime")
        return found

    # --- its life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin: admission, preparation, start, loading, and then until something ends it."""
        self._task = asyncio.create_task(self._live(self._first), name=f"replica {self.id}")

    def adopt(self, instance: Instance, runtime: Runtime, saved: records.ReplicaRecord) -> None:
        """Go on with what an earlier daemon started."""
        self.instance, self._runtime, self.runtime_name = instance, runtime, saved.runtime
        self.plan = records.plan(saved)
        self.started, self.ready_s, self.restarts = saved.started, saved.ready_s, saved.restarts
        if self.sleeps:  # the daemon before may have put it to sleep
            self._move(State.LOADING)
        else:
            self.ready_at = time.time()
            self._move(State.READY)
        self._task = asyncio.create_task(self._live(self._rouse), name=f"replica {self.id}")

    async def _rouse(self) -> None:
        """Wake it where it may sleep; what does not wake is ended, and so started again."""
        assert self.instance is not None
        if self.sleeps and not await self._awake(self.instance):
            log.warning("replica %s does not wake: starting it again", self.id)
            await self.instance.stop(0)
            return
        await self.life.adapt(self)
        if self.state is State.LOADING:
            self.ready_at = time.time()
            self._move(State.READY)

    async def _awake(self, instance: Instance) -> bool:
        path, timeout = instance.spec.sleep[1], self._start_limit(instance.spec)
        return await healthy(instance.socket, path, timeout, "POST") and await healthy(
            instance.socket, instance.spec.readiness.path
        )

    async def _live(self, begin: Callable[[], Awaitable[None]] | None) -> None:
        try:
            if begin is not None:
                await begin()
            while True:
                await self._serve()
                await self._again()
        except PierError as exc:
            await self._fail(exc)
        except Exception as exc:  # a bug in one replica's care must not leave its callers waiting
            log.exception("replica %s", self.id)
            await self._fail(PierError(f"internal error while running {self.life.model.name}: {exc!r}"))

    async def _first(self) -> None:
        self._phase(State.CREATED)
        await self._place(None)
        try:
            await self._launch()
        except PierError as exc:
            if self.instance is not None or self.runtime_name == "process":  # it started, or nothing else is left
                raise
            await self._place(exc)
            await self._launch()

    async def _place(self, refusal: PierError | None) -> None:
        plan, self.runtime_name, runtime = await self._admit(self, refusal)
        self.plan, self._runtime = plan, runtime
        for note in plan.notes:
            self.emit(Note(message=note))
        self._move(State.PREPARING, self.runtime_name)
        spec = await runtime.prepare(plan.spec, self.emit)
        if spec.build is not None:
            spec = await self.life.build(spec, self.life.model, runtime, self.emit)
        self.plan = msgspec.structs.replace(plan, spec=spec)

    async def _launch(self) -> None:
        assert self.plan is not None
        assert self._runtime is not None
        self._move(State.STARTING)
        self.instance = await self._runtime.start(self.plan.spec)
        self._move(State.LOADING)
        await wait_ready(self.instance, timeout=self._start_limit(self.plan.spec))
        await self.life.adapt(self)
        now = time.time()
        self.ready_s = time.monotonic() - self._began
        self.ready_at = now
        self._move(State.READY)
        self.save()

    def _start_limit(self, spec: LaunchSpec) -> float:
        """Seconds that a start may take: what the user says for all, or what is right for the engine."""
        return self.life.start_timeout or spec.readiness.timeout

    async def _serve(self) -> None:
        """Wait for the end of the program, which nobody asked for."""
        assert self.instance is not None
        end = await self.instance.wait()
        self.ended = error = await failure(self.instance, end)
        self._counted = self.life.backoff.count(self._counted, time.time() - self.ready_at)
        self._move(State.BACKOFF, error.message, error)

    async def _again(self) -> None:
        """Start it again, after a pause that grows, until it is ready or the limit is reached."""
        while True:
            error = self.status.error
            delay = self.life.backoff.delay(self._counted)
            if delay is None:
                assert error is not None
                raise EngineFailed(
                    f"{error.message}, and was started again {self._counted} times in vain",
                    hint=error.hint,
                    data=error.data,
                )
            await self._clear()
            await asyncio.sleep(delay)
            self._counted += 1
            self.restarts += 1
            self._began = time.monotonic()
            try:
                await self._launch()
            except PierError as exc:
                await self._clear()
                self._move(State.BACKOFF, exc.message, exc)
            else:
                return

    async def _fail(self, error: PierError) -> None:
        await self._clear()
        if self.state not in LEAVING:
            self._move(State.FAILED, error.message, error)
        self.life.lease.close()

    async def _clear(self) -> None:
        """End and remove what there is of the program; a runtime that cannot must not keep us."""
        instance, self.instance = self.instance, None
        if instance is not None:
            with contextlib.suppress(PierError):
                await instance.stop(0)

    async def examine(self, timeout: float = 5.0) -> None:
        """Look at a replica that somebody saw break: when it does not answer it is ended, and so started again."""
        instance = self.instance
        if instance is None or self.state is not State.READY:
            return
        if await healthy(instance.socket, instance.spec.readiness.path, timeout):
            return
        if not await self.until(lambda: self.state is not State.READY, 0.5):
            log.warning("replica %s does not answer: ending it", self.id)
            await instance.stop(0)
            await self.until(lambda: self.state is not State.READY, timeout)

    # --- its sleep ------------------------------------------------------------------------------------------------

    @property
    def sleeps(self) -> bool:
        """Whether its engine can let go of its memory and stay."""
        return not self._restless and self.instance is not None and len(self.instance.spec.sleep) == 2

    def rest(self, drain: float) -> None:
        """Begin to put it to sleep: no new requests, then those it has, then its memory."""
        if self.state is State.READY and self.sleeps and self._resting is None:
            self._wanted = False
            self._move(State.DOZING)
            self._resting = asyncio.create_task(self._rest(drain), name=f"rest {self.id}")

    def wake(self) -> None:
        """Begin to wake it; it is ready as soon as it answers, and started again where it does not."""
        self._wanted = True
        if self.state is State.SLEEPING and self._resting is None:
            self._resting = asyncio.create_task(self._wake(), name=f"wake {self.id}")

    async def _rest(self, drain: float) -> None:
        try:
            await self.life.withdrawn()
            if (instance := self.instance) is None:
                return
            await drained(self.until(lambda: not self.open), instance, drain)
            if self._wanted or self.open:
                self._move(State.READY)
            elif await healthy(instance.socket, instance.spec.sleep[0], self._start_limit(instance.spec), "POST"):
                self._move(State.SLEEPING)
                if self._wanted:
                    await self._wake()
            else:
                log.warning("replica %s cannot sleep", self.id)
                self._restless = True
                self._move(State.READY)
        except IllegalTransition:
            pass  # it ended meanwhile
        finally:
            self._resting = None

    async def _wake(self) -> None:
        try:
            if (instance := self.instance) is None:
                return
            self._began = time.monotonic()
            await self.life.readmit(self)
            self._move(State.LOADING)
            if await self._awake(instance):
                self.ready_at = time.time()
                self._move(State.READY)
            elif self.state is State.LOADING:
                log.warning("replica %s does not wake: starting it again", self.id)
                await instance.stop(0)
        except IllegalTransition:
            pass  # it ended meanwhile
        except PierError as exc:  # others have its memory and keep it
            await self._cancel()
            await self._fail(exc)
        finally:
            self.rising = False
            self._resting = None

    # --- its end --------------------------------------------------------------------------------------------------

    def leave(self, drain: float = 0.0) -> asyncio.Task[None]:
        """Begin to end it: no new requests, then up to ``drain`` seconds for those it has, then the program."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(drain), name=f"stop {self.id}")
            self._ending.add_done_callback(self._ended)
        return self._ending

    async def stop(self, drain: float = 0.0) -> None:
        """The same, and return when it is gone. Shared by callers; one that gives up does not interrupt it."""
        await asyncio.shield(self.leave(drain))

    def _ended(self, ending: asyncio.Task[None]) -> None:
        if not ending.cancelled() and (exc := ending.exception()) is not None:
            log.warning("replica %s did not end well: %s", self.id, exc)

    async def _end(self, drain: float) -> None:
        await self._cancel()
        if self.state in (State.READY, State.DOZING) and drain > 0 and self.instance is not None:
            self._move(State.DRAINING)
            await self.life.withdrawn()
            await drained(self.until(lambda: not self.open), self.instance, drain)
        if self.state is not State.STOPPED:
            if self.state is not State.STOPPING:
                self._move(State.STOPPING)
            instance, self.instance = self.instance, None
            try:
                if instance is not None:
                    await finish(instance, self._returned)
            finally:
                self._move(State.STOPPED)
                self.life.lease.close()

    def _returned(self) -> None:
        """Its program has ended: others may have its memory, before its remains are cleared away."""
        self.gone = True
        self._signal()

    async def detach(self) -> None:
        """Stop looking after it and leave its program running, for the next daemon."""
        await self._cancel()

    async def _cancel(self) -> None:
        if self._resting is not None and self._resting is not asyncio.current_task():
            self._resting.cancel()
            await asyncio.gather(self._resting, return_exceptions=True)
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- small things ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write down what the next daemon must know."""
        found = records.of(self) if self.state is State.READY else None
        if found is not None:
            with contextlib.suppress(FileNotFoundError):
                records.save(self.life.folder, found)

    def _move(self, state: State, detail: str = "", error: PierError | None = None) -> None:
        self.status = self.status.to(state, time.time(), error)
        self._phase(state, detail)
        self._signal()

    def _phase(self, state: State, detail: str = "") -> None:
        self.emit(Phase(replica=self.id, state=state, detail=detail, elapsed_s=time.monotonic() - self._began))

    def _signal(self) -> None:
        pulse, self._pulse = self._pulse, asyncio.Event()
        pulse.set()
        self._changed(self)
