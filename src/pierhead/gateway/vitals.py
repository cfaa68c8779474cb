"""What the gateway's own process holds now, as gauges: leaks and slow loops show here; counts no requests."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pierhead.gateway.metrics import Metrics

if TYPE_CHECKING:
    from pierhead.gateway.services import Services

_STARTED = time.time()
_PAGE = resource.getpagesize()
_LOOK = 0.02
_WINDOW = 10.0


def vitals(services: Services) -> str:
    """The exposition text; cheap enough for any scrape."""
    return "\n".join(_lines(services)) + "\n"


def _lines(services: Services) -> Iterator[str]:
    metrics = services.metrics
    for name, text, value in (
        ("relays_open", "Requests between their last byte in and their last byte out.", metrics.relays),
        ("holds_open", "Grants of keys that were not settled yet.", metrics.holds),
        ("tasks", "Asynchronous tasks that live now.", len(asyncio.all_tasks())),
        ("body_bytes", "Bytes of request bodies held now.", services.buffered),
        ("upstream_connections", "Connections to engines, busy or idle.", services.routes.connected()),
        ("loop_lag_seconds", "The longest that the loop was late in the last seconds.", round(services.lag.worst, 6)),
        ("loop_busy_lag_seconds", "The same, as far as it was the gateway's own work.", round(services.lag.own, 6)),
    ):
        yield from _gauge(f"pierhead_gateway_{name}", text, value)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    yield from _gauge("process_resident_memory_bytes", "Resident memory.", _resident())
    yield from _gauge("process_open_fds", "Open file descriptors.", len(os.listdir("/proc/self/fd")))
    yield from _gauge("process_start_time_seconds", "When the process began, Unix time.", round(_STARTED, 2))
    yield "# HELP process_cpu_seconds_total Processor time used."
    yield "# TYPE process_cpu_seconds_total counter"
    yield f"process_cpu_seconds_total {usage.ru_utime + usage.ru_stime:.6f}"


def _gauge(name: str, text: str, value: float) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} gauge"
    yield f"{name} {value}"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


class Lag:
    """How late the loop's own timer comes while it has work; ``worst`` covers the last ten to twenty seconds.

    A timer that is late by x means that everything which became due at that moment waited for x. ``own`` leaves out
    what others on the machine took: the loop's thread must have used as much of the processor.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._now = self._before = self._now_own = self._before_own = 0.0
        self._used = 0.0
        self._until = 0.0
        self._due = 0.0

    @property
    def worst(self) -> float:
        """Seconds."""
        return max(self._now, self._before)

    @property
    def own(self) -> float:
        """Seconds."""
        return max(self._now_own, self._before_own)

    def watch(self) -> None:
        """Begin to look when there is work; called now and then. It ends by itself, so an idle gateway sleeps."""
        if self._metrics.relays and not self._due:
            self._due = time.monotonic() + _LOOK
            self._used = time.thread_time()
            asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._until:
            self._before, self._now, self._until = self._now, 0.0, now + _WINDOW
            self._before_own, self._now_own = self._now_own, 0.0
        late = now - self._due
        self._now = max(self._now, late)
        self._now_own = max(self._now_own, min(late, time.thread_time() - self._used))
        self._due = 0.0
        self.watch()
