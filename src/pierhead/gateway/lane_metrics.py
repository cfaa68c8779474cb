"""The Prometheus text about queues, slots and circuits; counts nothing itself."""

from __future__ import annotations

from collections.abc import Iterable

from pierhead.gateway.lanes import Lane
from pierhead.gateway.metrics import labels
from pierhead.routing.health import Circuit


def lane_metrics(lanes: Iterable[Lane]) -> str:
    """The samples of all lanes, families together."""
    every = sorted(lanes, key=lambda lane: lane.name)
    targets = [(lane.name, target) for lane in every for target in lane.targets]
    families: tuple[tuple[str, str, str, list[str]], ...] = (
        ("queue_waiting", "gauge", "Requests that wait for a slot or a start.", _values(every, "waiting")),
        ("queue_refused_total", "counter", "Requests refused by a full queue.", _values(every, "refused")),
        (
            "queue_expired_total",
            "counter",
            "Requests whose time was over while they waited.",
            _values(every, "expired"),
        ),
        ("queue_waits_total", "counter", "Requests that had to wait, and wait no more.", _values(every, "served")),
        ("queue_wait_seconds_total", "counter", "How long those waited.", _values(every, "waited")),
        (
            "slots_busy",
            "gauge",
            "Slots of a replica in use.",
            [f"{labels(model=name, replica=t.replica)} {t.busy}" for name, t in targets],
        ),
        (
            "replica_suspended",
            "gauge",
            "Whether a replica gets no requests because some failed there.",
            [f"{labels(model=n, replica=t.replica)} {int(t.health.state is not Circuit.CLOSED)}" for n, t in targets],
        ),
    )
    out: list[str] = []
    for name, kind, text, samples in families:
        out.append(f"# HELP pierhead_{name} {text}\n# TYPE pierhead_{name} {kind}")
        out += [f"pierhead_{name}{sample}" for sample in samples]
    return "\n".join(out) + "\n"


def _values(lanes: Iterable[Lane], field: str) -> list[str]:
    return [f"{labels(model=lane.name)} {getattr(lane, field):.10g}" for lane in lanes]
