"""Whether a replica should get requests, from how they ended there and from probes; sends neither."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

_WINDOW = 32  # last outcomes that the ratio of failures is taken over
_MASK = (1 << _WINDOW) - 1


class Circuit(Enum):
    """CLOSED lets requests through, OPEN none, HALF_OPEN one whose end decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True)
class Tolerance:
    """What opens a circuit: ``consecutive`` failures, or ``ratio`` of the last 32 with at least ``least`` failures.

    It stays open for ``initial`` seconds, twice as long each time it opens again, at most ``maximum``.
    """

    consecutive: int = 3
    ratio: float = 0.5
    least: int = 8
    initial: float = 1.0
    maximum: float = 60.0


class Health:
    """The circuit of one replica; times are monotonic seconds. ``spotless``: nothing failed lately, so that a success
    need not be told.

    ``jitter`` is from 0 to 1 and shortens a pause by up to a quarter, so that gateways do not all come back at once.
    """

    __slots__ = ("_failures", "_opened", "_outcomes", "_probed", "_tolerance", "spotless", "state", "until")

    def __init__(self, tolerance: Tolerance | None = None) -> None:
        self._tolerance = tolerance or Tolerance()
        self.state = Circuit.CLOSED
        self.until = 0.0  # when an open circuit lets one request through
        self._failures = 0  # in a row
        self._outcomes = 0  # bits of the last outcomes, 1 for a failure
        self._opened = 0  # times in a row that it opened
        self._probed = 0.0  # when the request that decides was let through
        self.spotless = True

    def allows(self, now: float) -> bool:
        """Whether a request may be sent; asks only, see ``sending``."""
        return self.state is Circuit.CLOSED or now >= self.opens

    @property
    def opens(self) -> float:
        """When time alone will let a request through again; 0.0 where one may go now."""
        if self.state is Circuit.CLOSED:
            return 0.0
        # Whoever was let through may have left without a word: after a while another may try.
        return self.until if self.state is Circuit.OPEN else self._probed + self._tolerance.maximum

    def sending(self, now: float) -> None:
        """A request is sent; of an open circuit whose time has come it is the one that decides."""
        if self.state is not Circuit.CLOSED:
            self.state = Circuit.HALF_OPEN
            self._probed = now

    def success(self, now: float) -> None:
        """A request ended well. One that was under way when the circuit opened does not close it."""
        if self.state is Circuit.OPEN:
            return
        if self.state is Circuit.HALF_OPEN:
            self.state = Circuit.CLOSED
            self._outcomes = 1  # not spotless until this has moved out of the window, so that pauses go on growing
        self._failures = 0
        self._outcomes = self._outcomes << 1 & _MASK
        if not self._outcomes:
            self._opened = 0
            self.spotless = True

    def failure(self, now: float, jitter: float = 0.0) -> None:
        """A request failed by the replica's fault, or a probe did."""
        self.spotless = False
        self._failures += 1
        self._outcomes = (self._outcomes << 1 | 1) & _MASK
        if self.state is Circuit.OPEN:
            return  # one that was under way when it opened
        limits = self._tolerance
        failed = self._outcomes.bit_count()
        if (
            self.state is Circuit.HALF_OPEN
            or self._failures >= limits.consecutive
            or (failed >= limits.least and failed >= limits.ratio * _WINDOW)
        ):
            self._open(now, jitter)

    def probed(self, well: bool, now: float, jitter: float = 0.0) -> None:
        """A health check was answered, or not: a good one lets a request decide at once."""
        if not well:
            if self.state is Circuit.OPEN:
                self.until = max(self.until, now + self._tolerance.initial)
            else:
                self.failure(now, jitter)
        elif self.state is Circuit.OPEN:
            self.until = now

    def abandoned(self, now: float) -> None:
        """A request ended without telling anything about the replica: its client left. The next one decides."""
        if self.state is Circuit.HALF_OPEN:
            self.state = Circuit.OPEN
            self.until = now

    def _open(self, now: float, jitter: float) -> None:
        limits = self._tolerance
        pause = min(limits.maximum, limits.initial * 2.0 ** min(self._opened, 30))
        self._opened += 1
        self.state = Circuit.OPEN
        self.until = now + pause * (1 - 0.25 * jitter)
