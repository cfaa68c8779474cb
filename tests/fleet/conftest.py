"""A supervisor over a runtime whose engines are small servers in this process, told what to do by the test."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pierhead.config import FleetSettings, Settings
from pierhead.engines.base import EngineFacts, ImageRecipe, LaunchSpec, Plan, PlanRequest
from pierhead.engines.gpus import Device, take
from pierhead.errors import NotFound, OutOfMemory, PierError
from pierhead.events import AnyEvent, Listener
from pierhead.fleet.memory import Memory
from pierhead.fleet.supervisor import Supervisor
from pierhead.runtimes.base import Capabilities, Exit, Stats
from pierhead.store.model import ModelFile, ModelRecord

MIB = 1 << 20


class Engine:
    """A server on the spec's socket: answers 200 to everything until it is told to end."""

    sandbox = "none"
    _numbers = itertools.count(1 << 22)  # no kernel's processes have such

    def __init__(self, place: Place, spec: LaunchSpec, folder: Path) -> None:
        self.spec = spec
        self.pid = next(self._numbers)
        self.folder = folder
        self.healthy = True
        self.asked: list[str] = []
        self.answers = asyncio.Event()  # unset, it hears and does not answer yet
        self.answers.set()
        self.uses = (0, 0)  # bytes: anonymous, of mapped files
        self._place = place
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server | None = None

    @property
    def socket(self) -> str:
        return str(self.folder / "s" / "engine.sock")

    async def listen(self) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
                asked = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
                self.asked.append(f"{asked[0].decode()} {asked[1].decode()}")
                await self.answers.wait()
                status = b"200 OK" if self.healthy else b"500 Broken"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        if not self._exit.done():
            self._server = await asyncio.start_unix_server(answer, self.socket, start_serving=False)
            await self._server.start_serving()

    def end(self, code: int = 1, signal: int = 0) -> None:
        """The program ends by itself."""
        if self._server is not None:
            self._server.close()
        if not self._exit.done():
            self._exit.set_result(Exit(code, signal, at=time.time()))

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)

    async def stop(self, timeout: float | None = None) -> Exit:
        self.end(0, 15)
        self._place.running.pop(self.spec.replica, None)
        shutil.rmtree(self.folder, ignore_errors=True)
        return await self.wait()

    async def stats(self) -> Stats:
        return Stats(at=time.time(), anonymous=self.uses[0], mapped=self.uses[1])

    async def logs(self, *, tail: int | None = None, follow: bool = False) -> AsyncIterator[bytes]:
        for line in (b"loading", b"engine: it is broken"):
            yield line


@dataclass
class Place:
    """The runtime. ``loads`` gates loading; ``crashes`` of the next starts end while loading."""

    folder: Path
    name: str = "process"
    available: bool = True
    prepared: bool = True
    crashes: int = 0
    refuses: str = ""
    starts: int = 0
    prepares: int = 0
    running: dict[str, Engine] = field(default_factory=dict)
    loads: asyncio.Event = field(default_factory=asyncio.Event)
    prepare_gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.loads.set()
        self.prepare_gate.set()

    async def capabilities(self, spec: LaunchSpec | None = None) -> Capabilities:
        return Capabilities(name=self.name, available=self.available, prepared=self.prepared, reason="switched off")

    async def prepare(self, spec: LaunchSpec, listener: Listener) -> LaunchSpec:
        await self.prepare_gate.wait()
        self.prepares += 1
        self.prepared = True
        return msgspec.structs.replace(spec, image_name=f"image-{self.name}")

    async def start(self, spec: LaunchSpec) -> Engine:
        self.starts += 1
        if self.refuses:
            raise PierError(self.refuses)
        engine = Engine(self, spec, self.folder / spec.replica)
        (engine.folder / "s").mkdir(parents=True)
        self.running[spec.replica] = engine
        if self.crashes:
            self.crashes -= 1
            engine.end(7)
            return engine
        try:
            await self.loads.wait()
            await engine.listen()
        except asyncio.CancelledError:  # as real runtimes do: a start that is given up leaves nothing
            await engine.stop()
            raise
        return engine

    async def list(self) -> list[str]:
        return list(self.running)

    async def adopt(self, replica: str) -> Engine | None:
        return self.running.get(replica)


class Planner:
    """An engine that needs what the model's metadata says."""

    name = "toy"
    facts = EngineFacts(name="toy", title="Toy", formats=("gguf",), serves=("chat",))

    def __init__(self, recipe: bool = True, image: str = "") -> None:
        self._recipe, self._image = recipe, image
        self.said: dict[str, Any] = {}  # of the launch spec, besides

    def capabilities(self, files: tuple[ModelFile, ...], metadata: Mapping[str, Any]) -> tuple[str, ...]:
        return ("chat",)

    def accepts(self, files: tuple[ModelFile, ...]) -> bool:
        return True

    def validate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return dict(settings)

    def plan(self, request: PlanRequest) -> Plan:
        needed = int(request.metadata["needs"])
        if needed > request.free_memory:
            raise OutOfMemory(f"{request.model} needs {needed}", data={"needed": needed})
        spec = LaunchSpec(
            replica=request.replica,
            model=request.model,
            engine="toy",
            argv=(),
            model_dir=str(request.model_dir),
            image=ImageRecipe("toy", "", ()) if self._recipe else None,
            image_name=self._image,
            sleep=tuple(request.metadata.get("sleep", ())),
            **self.said,
        )
        on_gpu = int(request.metadata.get("on_gpu", 0))
        if request.settle and request.metadata.get("divides"):
            on_gpu = min(on_gpu, max((d.free for d in request.devices), default=0))
        devices = take(request.model, request.devices, on_gpu)
        return Plan(
            spec=spec,
            context=int(request.settings.get("context", 1024)),
            memory=needed,
            devices={name: size for name, size in devices.items() if size},
            parallel=int(request.metadata.get("at_once", 0)),
        )


class Shelf:
    """A store with models ``a`` to ``d`` that need 100 MiB each."""

    def __init__(self) -> None:
        self.records = {
            n: ModelRecord(
                name=n,
                names=(n,),
                digest=f"sha256:{n * 64}",
                size=1,
                created="2026-01-01T00:00:00Z",
                files=(),
                metadata={"needs": 100 * MIB},
            )
            for n in "abcd"
        }
        self.pins: dict[str, str] = {}

    def get(self, name: str) -> ModelRecord:
        for record in self.records.values():
            if name in (record.name, record.digest):
                return record
        raise NotFound(f"there is no model '{name}'")

    def materialize(self, record: ModelRecord) -> Path:
        return Path("/models") / record.name

    def recheck(self, record: ModelRecord) -> None: ...

    def pin(self, digest: str, owner: str) -> None:
        self.pins[owner] = digest

    def unpin(self, owner: str) -> None:
        self.pins.pop(owner, None)

    def pinned(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for owner, digest in self.pins.items():
            found[digest] = (*found.get(digest, ()), owner)
        return found


@dataclass
class Yard:
    """A supervisor and all that it stands on."""

    process: Place
    docker: Place
    store: Shelf
    folder: Path
    planner: Planner = field(default_factory=Planner)
    memory: Memory = Memory(1 << 40, 1 << 40)
    gpus: tuple[Device, ...] = ()
    gpu_uses: dict[int, dict[str, int]] = field(default_factory=dict)
    fleet_settings: FleetSettings = FleetSettings(
        backoff_initial=0.01, backoff_max=5.0, max_restarts=3, drain_timeout=5.0, memory_wait=0.0, measure=0.0
    )
    supervisors: list[Supervisor] = field(default_factory=list)
    events: list[AnyEvent] = field(default_factory=list)

    async def open(self, **extra: Any) -> Supervisor:
        fleet = Supervisor(
            store=self.store,
            engines=(self.planner,),
            runtimes={"process": self.process, "docker": self.docker},
            settings=Settings(fleet=self.fleet_settings),
            replicas_dir=self.folder,
            memory=lambda: self.memory,
            devices=lambda: self.gpus,
            uses=lambda: self.gpu_uses,
            **extra,
        )
        self.supervisors.append(fleet)
        await fleet.adopt()
        return fleet

    @property
    def listener(self) -> Callable[[AnyEvent], None]:
        return self.events.append

    def engine(self, fleet: Supervisor) -> Engine:
        (only,) = fleet.all()
        return self.process.running[only.id]


@pytest.fixture
async def yard() -> AsyncIterator[Yard]:
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    yard = Yard(Place(folder), Place(folder, "docker", available=False), Shelf(), folder)
    try:
        yield yard
    finally:
        for place in (yard.process, yard.docker):
            place.loads.set()
        for fleet in yard.supervisors:
            await fleet.close(drain=True)
        shutil.rmtree(folder, ignore_errors=True)
