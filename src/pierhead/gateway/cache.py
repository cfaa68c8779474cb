"""Answers to repeated requests, kept in memory within bounds of size and age; knows no connections."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from pierhead.gateway.usage import Usage

if TYPE_CHECKING:
    from pierhead.gateway.routes import Entry

_ALWAYS = ("embeddings", "rerank", "score")  # the same question has the same answer
_GENERATE = ("chat", "completions", "messages")
_OVERHEAD = 500  # bytes that an answer takes beside its body, about


class Kept(NamedTuple):
    """A whole answer; ``until`` is monotonic time."""

    kind: bytes
    body: bytes
    usage: Usage
    until: float


class Cache:
    """At most ``size`` bytes of answers, each for ``ttl`` seconds; the one not asked for longest goes first."""

    def __init__(self, size: int, ttl: float) -> None:
        self.ttl = ttl
        self.most = size // 8  # the longest answer that is kept
        self._room = size
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()

    def get(self, name: bytes, now: float) -> Kept | None:
        """The answer of that name, if there is one that is not too old."""
        kept = self._kept.get(name)
        if kept is None:
            return None
        if kept.until <= now:
            self._drop(name)
            return None
        self._kept.move_to_end(name)
        return kept

    def put(self, name: bytes, kept: Kept) -> None:
        """Keep an answer."""
        if name in self._kept:
            self._drop(name)
        self._room -= len(kept.body) + _OVERHEAD
        self._kept[name] = kept
        while self._room < 0:
            self._drop(next(iter(self._kept)))

    def _drop(self, name: bytes) -> None:
        self._room += len(self._kept.pop(name).body) + _OVERHEAD


def name(who: str, operation: str, entry: Entry, body: bytes, forced: bool) -> bytes | None:
    """What a request's answer is kept under; None when the same request may have another answer.

    It stands for the key, the model as it runs now (its digest and its replicas) and the body, however that is spelt.
    """
    try:
        decoded: Any = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    if not isinstance(decoded, dict) or operation not in (*_ALWAYS, *_GENERATE):
        return None
    members = cast("dict[str, Any]", decoded)
    if operation in _GENERATE and not forced and not _deterministic(members):
        return None
    running = ",".join(sorted(f"{target.replica} {target.model} {target.wanted.text}" for target in entry.targets))
    parts = (who.encode(), operation.encode(), entry.name.encode(), entry.docker, running.encode())
    digest = hashlib.sha256()
    for part in (*parts, msgspec.json.encode(members, order="deterministic")):
        digest.update(b"%d:" % len(part) + part)
    return digest.digest()


def _deterministic(members: dict[str, Any]) -> bool:
    temperature = members.get("temperature")
    return (temperature is not None and temperature == 0) or isinstance(members.get("seed"), int)
