"""Which names lead to which engines: the last snapshot, ready to look up; decides, relays nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from pierhead.config import TrafficSettings
from pierhead.gateway.faults import Fault
from pierhead.gateway.lanes import Lane
from pierhead.gateway.link import Activity, Endpoint, Route, Snapshot
from pierhead.gateway.operations import MEMBER
from pierhead.gateway.plans import Live
from pierhead.gateway.upstream import Target


class Entry:
    """One route with its live targets, or a plan; ``timeout`` are a provider's seconds to the first byte (0: none)."""

    __slots__ = ("aliases", "card", "docker", "facts", "lane", "name", "plan", "targets", "timeout")

    def __init__(self, route: Route, targets: tuple[Target, ...], lane: Lane, plan: Live | None) -> None:
        self.name = route.name
        self.aliases = route.aliases
        self.targets = targets
        self.lane = lane
        self.plan = plan
        self.timeout = next((t.outside.timeout for t in targets if t.outside is not None), 0.0)
        self.facts = _card(route)
        self.card = msgspec.json.encode(self.facts)
        self.docker = msgspec.json.encode(route.docker or {"id": route.name, "tags": [route.name]})

    def ill(self, now: float) -> bool:
        """Whether everything that could answer has failed lately, and it is too early to try again."""
        return bool(self.targets) and not any(t.health.allows(now) for t in self.targets)


def _card(route: Route) -> dict[str, Any]:
    return {"id": route.name, "object": "model", "created": 0, "owned_by": "pierhead"} | route.card


def _folded(name: str) -> str:
    """A name as Ollama's users write it: any case, the tag ``latest`` left out, its registry spelt out."""
    name = name.lower().removesuffix(":latest")
    return name.removeprefix("registry.ollama.ai/").removeprefix("library/")


class RouteTable:
    """Holds what the last snapshot said; targets live on from one snapshot to the next."""

    def __init__(self, traffic: Mapping[str, TrafficSettings] | None = None) -> None:
        self._traffic = traffic or {}
        self.lanes: dict[tuple[str, bool], Lane] = {}  # by name, apart for models and for what is only configured
        self.version = -1
        self.control: Target | None = None
        self.models = b'{"object":"list","data":[]}'
        self.docker = b"[]"
        self._entries: dict[str, Entry] = {}
        self._destinations: dict[str, Entry] = {}
        self._folded: dict[str, Entry] = {}
        self._names: tuple[str, ...] = ()
        self._targets: dict[Endpoint, Target] = {}
        self._leaving: list[Target] = []

    def apply(self, snapshot: Snapshot) -> None:
        """Replace the table."""
        before = self._targets
        self._targets = {}
        entries: dict[str, Entry] = {}
        destinations: dict[str, Entry] = {}
        lanes: dict[tuple[str, bool], Lane] = {}
        for route in snapshot.routes:
            entry = self._entry(route, before, lanes)
            if route.plan is None or route.endpoints:
                destinations[route.name] = entry
            if not route.hidden:
                entries[route.name] = entry
            for alias in route.aliases:
                entries.setdefault(alias, entry)
        for target in before.values():
            target.retire()
            self._leaving.append(target)
        for lane in self.lanes.values():
            lane.update(())
        self.lanes = lanes
        self._entries = entries
        self._destinations = destinations
        self._names = tuple(r.name for r in snapshot.routes if not r.hidden)
        self._folded = {}
        for name, entry in entries.items():
            self._folded.setdefault(_folded(name), entry)
        distinct = [entries[name] for name in self._names]
        self.models = b'{"object":"list","data":[' + b",".join(e.card for e in distinct) + b"]}"
        self.docker = b"[" + b",".join(e.docker for e in distinct) + b"]"
        path = snapshot.control_socket
        if self.control is None or self.control.path != path:
            self.control = Target(Endpoint("", path)) if path else None
        self.version = snapshot.version
        for target in (*self._targets.values(), *self._leaving):
            target.changed = target.changed or bool(target.open)

    def _entry(self, route: Route, before: dict[Endpoint, Target], lanes: dict[tuple[str, bool], Lane]) -> Entry:
        """A route with the targets and the lane that it had."""
        for endpoint in route.endpoints:
            target = before.pop(endpoint, None) or Target(endpoint)
            self._targets.setdefault(endpoint, target)
        place = (route.name, route.plan is None)
        lane = lanes[place] = self.lanes.pop(place) if place in self.lanes else self._lane(route.name)
        targets = tuple(self._targets[e] for e in route.endpoints)
        lane.update(targets)
        known = self._entries.get(route.name)
        plan = (
            Live(route.name, route.plan, known.plan if known is not None else None) if route.plan is not None else None
        )
        return Entry(route, targets, lane, plan)

    def _lane(self, name: str) -> Lane:
        return Lane(name, self._traffic.get(name) or self._traffic.get("*") or TrafficSettings())

    def find(self, name: str) -> Entry:
        """The entry for a name or alias; Fault 404 says which command brings the model."""
        entry = self._entries.get(name) or self._folded.get(_folded(name))
        if entry is not None:
            return entry
        if self.version < 0:
            raise Fault(
                503,
                "starting",
                "the gateway does not know its models yet: the daemon is still starting",
                hint="Try again in a second.",
                headers=((b"retry-after", b"1"),),
            )
        shown = name if len(name) <= 200 else name[:200] + "…"
        close = difflib.get_close_matches(shown, self._names, 1) if len(self._names) < 1000 else []
        near = f"Did you mean '{close[0]}'? Else type" if close else "Type"
        raise Fault(
            404,
            "model_not_found",
            f"the model '{shown}' is not on this machine.",
            param="model",
            hint=f"{near}: pier pull {shown}",
            data={"model": shown},
        )

    def owner(self, name: str) -> str:
        """The route's name in that of a path, which may go on with the name of one of the engine's models."""
        route, member, _ = name.rpartition(MEMBER)
        known = not member or name in self._entries or _folded(name) in self._folded
        return name if known else route

    def destination(self, name: str) -> Entry | None:
        """The entry that a plan names, which clients may not be able to name."""
        return self._destinations.get(name)

    def plans(self) -> Iterable[Live]:
        """The plans of all routes that have one."""
        return [plan for name in self._names if (plan := self._entries[name].plan) is not None]

    def target(self, endpoint: Endpoint) -> Target:
        """The target of an endpoint that the daemon named before its snapshot did."""
        target = self._targets.get(endpoint)
        if target is None:
            target = self._targets[endpoint] = Target(endpoint)
        return target

    def targets(self) -> Iterable[tuple[str, Target]]:
        """(model, target) for every endpoint of a route."""
        for name, entry in self._destinations.items():
            for target in entry.targets:
                yield name, target

    def distinct(self) -> Iterable[Entry]:
        """Every route once."""
        return (self._entries[name] for name in self._names)

    def connected(self) -> int:
        """How many connections to engines and the control API there are, busy or idle."""
        control = self.control.connected if self.control is not None else 0
        return control + sum(t.connected for t in (*self._targets.values(), *self._leaving))

    def sweep(self, now: float) -> None:
        """Close idle connections that are too old."""
        for target in self._targets.values():
            target.sweep(now)
        if self.control is not None:
            self.control.sweep(now)

    def activity(self) -> tuple[Activity, ...]:
        """What changed since the last call; counters start anew."""
        everything = (*self._targets.values(), *self._leaving)
        busy: dict[str, int] = {}
        for target in everything:
            busy[target.replica] = busy.get(target.replica, 0) + target.open
        seen = tuple(_activity(target, busy[target.replica]) for target in everything if target.changed)
        self._leaving = [t for t in self._leaving if t.open]
        return seen


def _activity(target: Target, busy: int) -> Activity:
    """What one target did; ``busy``: requests open at its replica, which may have several targets."""
    activity = Activity(
        replica=target.replica,
        open=busy,
        finished=target.finished,
        failed=target.failed,
        prompt_tokens=target.prompt_tokens,
        completion_tokens=target.completion_tokens,
        last_used=target.last_used,
    )
    target.finished = target.failed = target.prompt_tokens = target.completion_tokens = 0
    target.changed = False
    return activity
