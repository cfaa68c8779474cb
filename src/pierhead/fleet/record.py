"""What is written down about a replica so that the next daemon can take it over; small, atomic, one file each."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pierhead.engines.base import LaunchSpec, Plan
from pierhead.fleet.intent import Intent
from pierhead.fleet.wish import Wish

if TYPE_CHECKING:
    from pierhead.fleet.replica import Replica

VERSION = 1


class ReplicaRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that was ready; times are Unix times in seconds, ``memory`` bytes, ``keep_alive`` seconds.

    ``replicas`` is how many its model keeps; of several records of one model the one last ``asked`` holds.
    """

    version: int = VERSION
    spec: LaunchSpec
    digest: str
    engine: str
    runtime: str
    context: int
    memory: int
    devices: dict[str, int] = {}
    parallel: int = 0
    settings: dict[str, Any]
    keep_alive: float
    pinned: bool
    replicas: int = 1
    asked: float = 0.0
    started: float
    ready_s: float
    restarts: int = 0
    wish: Wish | None = None

    def intent(self) -> Intent:
        """How its model is kept; which runtime was asked for is not known any more."""
        return Intent(self.settings, None, self.keep_alive, self.pinned, self.replicas, self.asked)


def plan(saved: ReplicaRecord) -> Plan:
    """What it was started by."""
    return Plan(
        spec=saved.spec, context=saved.context, memory=saved.memory, devices=saved.devices, parallel=saved.parallel
    )


def new_id() -> str:
    """A fresh replica id: a letter and eleven more of ``[a-z0-9]``."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
    return "r" + "".join(secrets.choice(alphabet) for _ in range(11))


def of(replica: Replica) -> ReplicaRecord | None:
    """What is to be written down about a replica; None while it has no plan."""
    made, intent = replica.plan, replica.life.intent
    if made is None:
        return None
    return ReplicaRecord(
        spec=made.spec,
        digest=replica.life.model.digest,
        engine=made.spec.engine,
        runtime=replica.runtime_name,
        context=made.context,
        memory=made.memory,
        devices=made.devices,
        parallel=made.parallel,
        settings=intent.settings,
        keep_alive=intent.keep_alive,
        pinned=intent.pinned,
        replicas=max(1, intent.replicas),
        asked=intent.asked,
        started=replica.started,
        ready_s=replica.ready_s,
        restarts=replica.restarts,
        wish=replica.life.wish,
    )


def save(folder: Path, record: ReplicaRecord) -> None:
    """Put ``record`` into the replica's folder, which must exist; readers see the old or the new one, whole."""
    temporary = folder / f".record.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.encode(record))
    temporary.replace(folder / "record.json")


def load(folder: Path) -> ReplicaRecord | None:
    """The record in ``folder``; None when there is none, or one this version cannot read."""
    try:
        record = msgspec.json.decode((folder / "record.json").read_bytes(), type=ReplicaRecord)
    except (OSError, msgspec.DecodeError):
        return None
    return record if record.version == VERSION and record.spec.replica == folder.name else None


def forget(folder: Path) -> None:
    """Remove what a runtime left of a replica's folder."""
    shutil.rmtree(folder, ignore_errors=True)
