"""The JSON shapes of the control API that are its own; the others belong to store, fleet and keys."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pierhead.config import Replicas
from pierhead.fleet.merge import Setting
from pierhead.gateway.grants import Wanted
from pierhead.runtimes.base import Capabilities

API = 1


class VersionInfo(msgspec.Struct, frozen=True):
    """Who answers; ``started`` is ISO 8601 UTC, ``api`` grows with incompatible changes."""

    version: str
    api: int
    pid: int
    started: str


class GatewayInfo(msgspec.Struct, frozen=True):
    """The gateway's process."""

    pid: int | None
    connected: bool
    connections: int = 0
    problems: tuple[str, ...] = ()


class StatusInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The state of this host; ``origins`` says where each setting that was set came from."""

    version: str
    pid: int
    uptime_s: float
    listeners: tuple[str, ...]
    runtimes: tuple[Capabilities, ...]
    replicas: int
    models: int
    gateway: GatewayInfo
    settings: dict[str, Any]
    origins: dict[str, str]
    idle_exit_s: float
    route_problems: tuple[str, ...] = ()


class RouteInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A name that clients may send; ``to`` tells who answers. One that is not ``active`` is not offered."""

    name: str
    kind: Literal["model", "route", "provider"]
    active: bool = True
    to: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    mirror: str = ""
    sticky: str = ""
    problems: tuple[str, ...] = ()


class RouteList(msgspec.Struct, frozen=True):
    """All names. ``error`` is what is wrong with ``file``, of which the last good version is in force then."""

    file: str
    error: dict[str, Any] | None
    routes: tuple[RouteInfo, ...]
    problems: tuple[str, ...] = ()

    def told(self) -> tuple[str, ...]:
        """Everything that does not work as it is written."""
        broken = (str(self.error["message"]),) if self.error is not None else ()
        return (*broken, *(f"{r.name}: {p}" for r in self.routes for p in r.problems), *self.problems)


class RouteText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole ``routes.toml``."""

    toml: str


class AdapterInfo(msgspec.Struct, frozen=True):
    """A LoRA of a model: its name in the store, its scale, what requests call it, and whether what runs has it.

    ``error`` is why the engine did not take it.
    """

    name: str
    scale: float
    model: str
    loaded: bool
    error: str = ""


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a model (``*``: of all), each with where it comes from and what it stands over.

    ``file`` is the user's ``models.toml``; ``error`` is what is wrong with it, while its last good version is in force.
    What a model that is ``running`` was started with may be older: ``pending`` are the settings that wait for its next
    start.
    """

    model: str
    engine: str = ""
    file: str
    error: dict[str, Any] | None = None
    running: bool = False
    pending: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    adapters: tuple[AdapterInfo, ...] = ()


class SettingsChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to write into ``models.toml`` and what to take out of it, by the names of settings."""

    set: dict[str, str | int | float | bool | list[Any] | dict[str, Any]] = {}
    unset: tuple[str, ...] = ()


class PullRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to pull, and the name to give it."""

    reference: str
    name: str | None = None


class CopyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Give the model ``source`` the further name ``target``."""

    source: str
    target: str


class StartRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which model to start and how; ``keep_alive`` in seconds, negative for ever; ``pin`` keeps it from eviction.

    ``replicas`` (1 to 64) is how many it keeps from now on: more are started behind the first, too many are drained.
    """

    model: str
    runtime: str | None = None
    settings: dict[str, Any] | None = None
    keep_alive: float | None = None
    pin: bool | None = None
    replicas: Replicas | None = None


class KeyRequest(Wanted, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The name of a key to make, and what it may do."""

    name: str


class RotateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long the key's old text goes on to hold, such as ``1h`` or ``7d``; "" ends it at once."""

    grace: str = ""


class ShutdownRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``stop`` drains and ends everything; ``handover`` leaves replicas and gateway running for the next daemon."""

    mode: Literal["stop", "handover"] = "stop"


class Accepted(msgspec.Struct, frozen=True):
    """The daemon will end in this way."""

    mode: str


class Stopped(msgspec.Struct, frozen=True):
    """The replicas that were stopped, and how many of each of their models are kept (0: it ended)."""

    stopped: list[str]
    kept: dict[str, int] = {}


class ReplicaStats(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of one replica; bytes, seconds; ``cpu_percent`` of one core since the reading before.

    ``anonymous`` and ``mapped`` are the parts of ``memory`` that are its own and that are pages of files; 0: not known.
    """

    id: str
    model: str
    memory: int
    memory_limit: int
    cpu_seconds: float
    cpu_percent: float
    pids: int
    read_bytes: int
    written_bytes: int
    at: float
    anonymous: int = 0
    mapped: int = 0


class StatsLine(msgspec.Struct, frozen=True):
    """One reading of everything that runs."""

    replicas: list[ReplicaStats]
