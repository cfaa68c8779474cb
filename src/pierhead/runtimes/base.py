"""Where engines run: the Runtime and Instance seams and what both sides of them exchange."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from pierhead.engines.base import LaunchSpec
from pierhead.events import Listener

# Who an engine is, in the words of programs that look for a name or a home: its number is in no list of users.
NOBODY = {"HOME": "/tmp", "USER": "engine", "LOGNAME": "engine", "LANG": "C.UTF-8"}  # noqa: S108  # a private tmpfs


class Places(msgspec.Struct, frozen=True):
    """What the ``$(…)`` names of a launch spec mean inside one instance; ``mounted``: mounts are at their targets."""

    python: str
    entry: str
    model_dir: str
    socket: str
    bridge: str = ""
    mounted: bool = True
    built: str = ""
    output: str = ""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a runtime can do here, as seen when it was asked.

    ``isolation`` lists what holds (``network``, ``filesystem``, ``memory``, ``pids``, ``cpu``, ``capabilities``…),
    ``missing`` says in full sentences what does not and what to install for it.
    """

    name: str
    available: bool
    reason: str = ""
    isolation: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    version: str = ""
    prepared: bool = True  # False: ``prepare`` has real work to do (an image to build)


class Exit(msgspec.Struct, frozen=True):
    """How an instance ended; ``signal`` is 0 unless one killed it; ``oom`` when the kernel did for memory."""

    code: int
    signal: int = 0
    oom: bool = False
    at: float = 0.0  # Unix time
    reason: str = ""


class Stats(msgspec.Struct, frozen=True):
    """One reading. Bytes, seconds of CPU since start, processes.

    ``anonymous`` and ``mapped`` are the parts of memory that are its own and that are pages of files; 0: not known.
    """

    memory: int = 0
    memory_limit: int = 0
    cpu_seconds: float = 0.0
    pids: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    at: float = 0.0
    anonymous: int = 0
    mapped: int = 0


class ExecResult(msgspec.Struct, frozen=True):
    """The end of a command run inside an instance; output is bounded to 1 MiB a stream."""

    code: int
    stdout: bytes
    stderr: bytes


class Instance(Protocol):
    """One running (or ended) engine program."""

    @property
    def spec(self) -> LaunchSpec: ...

    @property
    def socket(self) -> str:
        """Host path of the engine's unix socket (exists once the engine listens)."""
        ...

    @property
    def output(self) -> Path | None:
        """The folder that a job writes into; it goes with the instance."""
        ...

    async def wait(self) -> Exit:
        """Return when the program has ended, whoever ended it; at once if it has. Safe to call many times."""
        ...

    async def stop(self, timeout: float | None = None) -> Exit:
        """SIGTERM, then SIGKILL after ``timeout`` (default: the spec's); remove what the instance left behind."""
        ...

    async def stats(self) -> Stats: ...

    def logs(self, *, tail: int | None = None, follow: bool = False) -> AsyncIterator[bytes]:
        """Whole lines, oldest first; the last ``tail`` of them when given; ``follow`` goes on until the end."""
        ...

    async def exec(self, argv: tuple[str, ...], *, timeout: float = 30.0) -> ExecResult: ...

    async def attach(self) -> tuple[Any, Any]:
        """The stdio of a spec with ``stdio=True`` as (StreamReader, StreamWriter)."""
        ...


class Runtime(Protocol):
    """A place where instances run."""

    async def capabilities(self, spec: LaunchSpec | None = None) -> Capabilities:
        """What works here, and whether ``spec`` could start without preparation. Never raises for absence."""
        ...

    async def prepare(self, spec: LaunchSpec, listener: Listener) -> LaunchSpec:
        """Do the slow part once (build or pull the image); returns the spec with what it resolved."""
        ...

    async def start(self, spec: LaunchSpec) -> Instance:
        """Start it; returns as soon as the program runs (readiness is the fleet's). Cleans up if it raises."""
        ...

    async def list(self) -> list[str]:
        """Replica ids of everything of ours that runs, or ended and was not cleaned up, here."""
        ...

    async def adopt(self, replica: str) -> Instance | None:
        """Take over what an earlier daemon started; None when it is gone or not provably ours."""
        ...


Sandbox = Literal["bwrap", "plain"]


def expand(spec: LaunchSpec, places: Places) -> tuple[tuple[str, ...], dict[str, str]]:
    """The spec's argv and env with every ``$(NAME)`` replaced; ``$$(`` stays as a literal ``$(``."""
    table: Mapping[str, str] = {
        "$(PYTHON)": places.python,
        "$(ENTRY)": places.entry,
        "$(BRIDGE)": places.bridge,
        "$(BUILT)": places.built,
        "$(OUTPUT)": places.output,
        "$(MODEL_DIR)": places.model_dir,
        "$(SOCKET)": places.socket,
        **{f"$(MOUNT{at})": m.target if places.mounted else m.source for at, m in enumerate(spec.mounts)},
    }

    def one(text: str) -> str:
        parts = text.split("$$(")
        for i, part in enumerate(parts):
            for name, value in table.items():
                part = part.replace(name, value)
            parts[i] = part
        return "$(".join(parts)

    return tuple(one(a) for a in spec.argv), {k: one(v) for k, v in spec.env.items()}
