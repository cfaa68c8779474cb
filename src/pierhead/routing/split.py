"""Which destination of a route answers a request: conditions, weights, fallbacks and a shadow; sends nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from math import inf, log


class Sticky(StrEnum):
    """By what a client stays with its destination."""

    NONE = "none"
    USER = "user"
    CONVERSATION = "conversation"
    KEY = "key"


@dataclass(frozen=True)
class Asked:
    """What a decision may know of a request; headers are lower case, and "" is what is not there."""

    key: str = ""
    user: str = ""
    conversation: str = ""
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Condition:
    """``key`` or a ``header`` equals ``value``, or begins with it when ``prefix`` is set."""

    value: str
    header: str = ""
    prefix: bool = False

    def holds(self, asked: Asked) -> bool:
        """Whether ``asked`` fulfils it; one without a key, or without the header, fulfils none."""
        given = (asked.headers or {}).get(self.header.lower(), "") if self.header else asked.key
        if not given:
            return False
        return given.startswith(self.value) if self.prefix else given == self.value


@dataclass(frozen=True)
class Destination:
    """A name that answers, with its share; a weight of 0 gets nobody but by a rule or as a fallback."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Rule:
    """Requests that fulfil all of ``when`` are split among ``to`` instead."""

    when: tuple[Condition, ...]
    to: tuple[Destination, ...]


@dataclass(frozen=True)
class Mirror:
    """A ``share`` (0 to 1) of the requests is also sent to ``name``, whose answers nobody gets."""

    name: str
    share: float


@dataclass(frozen=True)
class Split:
    """How a route is split: the first rule that fits, else ``to``; ``fallbacks`` are tried in order afterwards."""

    to: tuple[Destination, ...]
    rules: tuple[Rule, ...] = ()
    fallbacks: tuple[str, ...] = ()
    sticky: Sticky = Sticky.NONE
    mirror: Mirror | None = None


@dataclass(frozen=True)
class Decision:
    """Who answers, who is asked in turn when that fails, and who gets a copy ("" for nobody)."""

    first: str
    then: tuple[str, ...] = ()
    mirror: str = ""


def decide(split: Split, asked: Asked, dice: float, shadow_dice: float = 1.0) -> Decision:
    """The decision for one request; ``dice`` and ``shadow_dice`` are drawn from 0 up to, not including, 1.

    A sticky request uses its own hash instead of ``dice``. So does one that has nothing to be recognised by when it is
    sticky by user or conversation but came with a key.
    """
    to = next((rule.to for rule in split.rules if all(c.holds(asked) for c in rule.when)), split.to)
    who = _identity(split.sticky, asked)
    first = weighted(who, to) if who else drawn(dice, to)
    names = (first, *split.fallbacks) if first else split.fallbacks
    order = tuple(dict.fromkeys(names))
    mirror = split.mirror
    copy = mirror.name if mirror is not None and shadow_dice < mirror.share and mirror.name not in order[:1] else ""
    return Decision(order[0] if order else "", order[1:], copy)


def _identity(sticky: Sticky, asked: Asked) -> str:
    if sticky is Sticky.NONE:
        return ""
    own = {Sticky.USER: asked.user, Sticky.CONVERSATION: asked.conversation, Sticky.KEY: ""}[sticky]
    # The kind is part of it: a user called like a key is not that key.
    return f"{sticky.value}:{asked.key}:{own}" if own else f"key:{asked.key}" if asked.key else ""


def drawn(dice: float, to: tuple[Destination, ...]) -> str:
    """The destination that ``dice`` falls on; "" when none has a weight."""
    total = sum(d.weight for d in to if d.weight > 0)
    point = dice * total
    last = ""
    for destination in to:
        if destination.weight > 0:
            last = destination.name
            point -= destination.weight
            if point < 0:
                return last
    return last


def weighted(who: str, to: tuple[Destination, ...]) -> str:
    """The destination of ``who`` by weighted rendezvous hashing; "" when none has a weight.

    The same in every process. When weights change, only as many move as the shares changed, and nobody moves between
    two destinations whose weights did not.
    """
    raw = who.encode("utf-8", "surrogatepass")
    best, score = "", -inf
    for destination in to:
        if destination.weight <= 0:
            continue
        salt = blake2b(destination.name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        number = int.from_bytes(blake2b(raw, digest_size=7, key=salt).digest(), "big")
        mine = destination.weight / -log((number + 0.5) / 2**56)
        if mine > score:
            best, score = destination.name, mine
    return best


class Allowance:
    """A budget that fills itself: ``per_minute`` at most, ``burst`` at once; for shadows and second tries."""

    __slots__ = ("_at", "_burst", "_have", "_rate")

    def __init__(self, per_minute: float, burst: float | None = None) -> None:
        self._rate = per_minute / 60
        self._burst = max(1.0, per_minute / 60) if burst is None else burst
        self._have = self._burst
        self._at = 0.0

    def take(self, now: float, amount: float = 1.0) -> bool:
        """Spend ``amount`` if it is there."""
        self._have = min(self._burst, self._have + max(0.0, now - self._at) * self._rate)
        self._at = now
        if self._have < amount:
            return False
        self._have -= amount
        return True
