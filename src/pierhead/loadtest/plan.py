"""What a load test sends and when: loads, arrivals and limits; pure, nothing is sent here."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

TASKS = ("chat", "completions", "embeddings", "rerank")
STREAMED = ("chat", "completions")


@dataclass(frozen=True)
class Load:
    """One step of a test: ``concurrency`` requests always under way, or ``rate`` arrivals per second."""

    concurrency: int = 0
    rate: float = 0.0

    @property
    def name(self) -> str:
        """How tables and files call it: ``4 at once``, ``2.5/s``."""
        return f"{self.rate:g}/s" if self.rate else f"{self.concurrency} at once"


@dataclass(frozen=True)
class Plan:
    """A whole test: every load, ``rounds`` times in turn, so that a machine that drifts does so for all of them.

    A pass ends after ``requests`` (when set) or ``seconds``. ``timeout`` counts from the intended arrival.
    ``most`` bounds the connections of an open loop; arrivals beyond wait, and their waiting counts.
    """

    loads: tuple[Load, ...]
    rounds: int = 3
    requests: int = 0
    seconds: float = 10.0
    warmup: int = 0
    timeout: float = 120.0
    seed: int = 1
    most: int = 512

    @property
    def passes(self) -> list[tuple[int, Load]]:
        """Round and load of every pass, in order."""
        return [(number, load) for number in range(self.rounds) for load in self.loads]

    @property
    def warm_up(self) -> int:
        """Requests before anything counts: enough to use as many connections as the largest load will."""
        return self.warmup if self.warmup >= 0 else max([load.concurrency for load in self.loads] + [4])


def arrivals(rate: float, seed: int, *, seconds: float = 0.0, count: int = 0) -> Iterator[float]:
    """Poisson arrivals: seconds since the start of a pass, until ``seconds`` are over or there were ``count``.

    The same seed gives the same arrivals, so that two servers get the same test.
    """
    chance = random.Random(seed)  # noqa: S311 - a load test, no secret
    at, made = 0.0, 0
    while True:
        at += chance.expovariate(rate)
        if made >= count if count else at >= seconds:
            return
        made += 1
        yield at
