"""Asks replicas that have others beside them how they are, so that an ill one is known before a request meets it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pierhead.gateway.faults import Fault
from pierhead.gateway.fetch import fetch
from pierhead.routing.health import Circuit

if TYPE_CHECKING:
    from pierhead.gateway.routes import RouteTable
    from pierhead.gateway.upstream import Target

_LOOK = 0.5  # seconds between looks at who is due
_AT_ONCE = 64
_TIMEOUT = 2.0
_HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"


async def probe(routes: RouteTable) -> None:
    """Probe until cancelled."""
    while True:
        await asyncio.sleep(_LOOK)
        due = list(_due(routes, time.monotonic()))[:_AT_ONCE]
        await asyncio.gather(*map(_ask, due))


def _due(routes: RouteTable, now: float) -> Iterator[Target]:
    """Replicas on this host, of models with more than one; those that are suspended more often."""
    for lane in routes.lanes.values():
        every = lane.settings.probe_interval
        if not lane.chooses or every <= 0:
            continue
        for target in lane.targets:
            if target.path.startswith("/") and now >= target.next_probe:
                target.next_probe = now + (every if target.health.state is Circuit.CLOSED else min(every, 1.0))
                yield target


async def _ask(target: Target) -> None:
    try:
        await fetch(target, _HEALTH, timeout=_TIMEOUT)
        well = True
    except Fault as fault:
        well = fault.status < 500  # an engine without that path is alive
    target.health.probed(well, time.monotonic(), random.random())  # noqa: S311 - spreads retries, guards nothing
    if well:
        for lane in target.lanes:
            if lane.waiting:
                lane.pump()
