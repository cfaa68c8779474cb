"""One JSON line a request on stderr, written by a thread so that a slow reader delays no stream; drops when it lags."""

from __future__ import annotations

import queue
import sys
import threading
import time
from typing import Any

import msgspec

_BACKLOG = 10000


class AccessLog:
    """Start it, ``put`` facts, ``close`` it; ``dropped`` counts lines that found the backlog full."""

    def __init__(self) -> None:
        self.dropped = 0
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_BACKLOG)
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def put(self, facts: dict[str, Any]) -> None:
        """Queue one line; never blocks."""
        facts["time"] = round(time.time(), 3)
        try:
            self._queue.put_nowait(facts)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, for two seconds at most."""
        try:
            self._queue.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(2)

    def _run(self) -> None:
        while (facts := self._queue.get()) is not None:
            try:
                sys.stderr.buffer.write(msgspec.json.encode(facts) + b"\n")
                sys.stderr.buffer.flush()
            except OSError:
                return
