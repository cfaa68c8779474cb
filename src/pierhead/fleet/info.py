"""What the outside sees of a replica: one flat JSON-safe record; changes nothing."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from pierhead.engines.base import Adapter

if TYPE_CHECKING:
    from pierhead.fleet.replica import Replica


class ReplicaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One replica; times are ISO 8601 UTC, ``ready_s`` seconds from asked to ready.

    ``memory_estimate`` are the bytes that it claimed when it started, ``memory_peak`` the most that it was seen to use
    (0: not known yet). ``devices`` are the bytes of accelerators' own memory that it claims, by CDI name, and
    ``devices_peak`` the most that it was seen to use there.

    ``wanted`` is how many replicas its model keeps (0: none, it ends), ``expires_at`` when the whole model is unloaded.
    ``adapters`` are the LoRAs that requests may name, ``fixed`` (number, scale) of those that always count, ``refused``
    says why others could not be loaded.
    ``call_prefix`` is what the gateway has a required tool call begin with, ``serves`` which of its operations the
    engine answers natively.
    """

    id: str
    model: str
    digest: str
    engine: str
    runtime: str
    state: str
    context: int
    parallel: int
    memory_estimate: int
    memory_peak: int
    devices: dict[str, int] = {}
    devices_peak: dict[str, int] = {}
    pid: int | None
    container: str | None
    started: str
    ready_s: float
    last_used: str | None
    expires_at: str | None
    pinned: bool
    wanted: int
    restarts: int
    requests_open: int
    socket: str
    call_prefix: str
    serves: tuple[str, ...]
    called: str
    adapters: tuple[Adapter, ...] = ()
    fixed: tuple[tuple[int, float], ...] = ()
    refused: dict[str, str] = {}
    error: dict[str, Any] | None
    sandbox: str


def iso(at: float) -> str:
    """A Unix time as ISO 8601 in UTC, to the millisecond."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe_replica(replica: Replica, idle_at: float | None) -> ReplicaInfo:
    """The record of ``replica`` as it is now; ``idle_at`` is when its model goes."""
    plan, instance, life = replica.plan, replica.instance, replica.life
    error = replica.status.error
    return ReplicaInfo(
        id=replica.id,
        model=life.model.plain,
        digest=life.model.digest,
        engine=plan.spec.engine if plan else "",
        runtime=replica.runtime_name,
        state=replica.state.value,
        context=plan.context if plan else 0,
        parallel=life.parallel,
        memory_estimate=plan.memory if plan else 0,
        memory_peak=replica.uses.peak,
        devices=dict(replica.claim().devices),
        devices_peak=dict(replica.uses.device_peaks),
        pid=replica.pid,
        container=getattr(instance, "container", None),
        started=iso(replica.started),
        ready_s=round(replica.ready_s, 4),
        last_used=iso(replica.last_used) if replica.last_used else None,
        expires_at=iso(idle_at) if idle_at is not None and replica.live else None,
        pinned=life.intent.pinned,
        wanted=life.intent.replicas,
        restarts=replica.restarts,
        requests_open=replica.open,
        socket=instance.socket if instance is not None else "",
        call_prefix=instance.spec.call_prefix if instance is not None else "",
        serves=instance.spec.serves if instance is not None else (),
        called=instance.spec.called if instance is not None else "",
        adapters=(*instance.spec.adapters, *replica.adapters) if instance is not None else (),
        refused=dict(replica.refused),
        fixed=instance.spec.fixed if instance is not None else (),
        error=error.to_dict() if error is not None else None,
        sandbox=str(getattr(instance, "sandbox", "")),
    )
