"""How much a key may ask for in a minute: buckets that fill evenly; counts requests or tokens, knows neither."""

from __future__ import annotations

import math
import time

from pierhead.gateway.operations import Dialect


class Bucket:
    """Holds up to ``capacity``, which comes back within a minute; ``level`` is what is there at ``at`` (monotonic)."""

    __slots__ = ("at", "capacity", "level", "rate")

    def __init__(self, capacity: int, now: float) -> None:
        self.capacity = capacity
        self.rate = capacity / 60
        self.level = float(capacity)
        self.at = now

    def refill(self, now: float) -> float:
        """What is there now."""
        level = self.level + (now - self.at) * self.rate
        self.at = now
        self.level = level = level if level < self.capacity else float(self.capacity)
        return level

    def resize(self, capacity: int, now: float) -> None:
        """Another limit: what was used stays used."""
        used = self.capacity - self.refill(now)
        self.capacity = capacity
        self.rate = capacity / 60
        self.level = capacity - used

    def wait(self, amount: float) -> int:
        """Whole seconds until ``amount`` is there."""
        return max(1, math.ceil((amount - self.level) / self.rate))

    @property
    def full_in(self) -> float:
        """Seconds until nothing counts any more."""
        return (self.capacity - self.level) / self.rate


def sized(bucket: Bucket | None, capacity: int, now: float) -> Bucket | None:
    """A bucket for a limit, where 0 is none; one that was there goes on."""
    if not capacity:
        return None
    if bucket is None:
        return Bucket(capacity, now)
    if bucket.capacity != capacity:
        bucket.resize(capacity, now)
    return bucket


def told(requests: Bucket | None, tokens: Bucket | None, dialect: Dialect) -> bytes:
    """Header lines that tell a client where it stands, in the words of its dialect."""
    if dialect == "anthropic":
        both = ((b"requests", requests), (b"tokens", tokens))
        return b"".join([_anthropic(name, bucket) for name, bucket in both if bucket is not None])
    if requests is not None and tokens is not None:
        one, most, two, all_ = requests.level, requests.capacity, tokens.level, tokens.capacity
        return _BOTH % (
            *(most, int(one) if one > 0 else 0, int((most - one) / requests.rate * 1000)),
            *(all_, int(two) if two > 0 else 0, int((all_ - two) / tokens.rate * 1000)),
        )
    lines = b""
    if requests is not None:
        level, capacity = requests.level, requests.capacity
        lines = _REQUESTS % (capacity, level if level > 0 else 0, (capacity - level) / requests.rate * 1000)
    if tokens is not None:
        level, capacity = tokens.level, tokens.capacity
        lines += _TOKENS % (capacity, level if level > 0 else 0, (capacity - level) / tokens.rate * 1000)
    return lines


def _openai(name: bytes) -> bytes:
    """The lines with room for a limit, what remains and the milliseconds until nothing counts any more."""
    return b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%dms\r\n" % (
        name,
        name,
        name,
    )


_REQUESTS, _TOKENS = _openai(b"requests"), _openai(b"tokens")
_BOTH = _REQUESTS + _TOKENS


def _anthropic(name: bytes, bucket: Bucket) -> bytes:
    full = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + bucket.full_in)).encode()
    return (
        b"anthropic-ratelimit-%b-limit: %d\r\nanthropic-ratelimit-%b-remaining: %d\r\n"
        b"anthropic-ratelimit-%b-reset: %b\r\n" % (name, bucket.capacity, name, max(0, bucket.level), name, full)
    )
