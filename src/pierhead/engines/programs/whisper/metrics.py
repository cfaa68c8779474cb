"""Counters and histograms in Prometheus' text form; a few numbers, so no library."""

from __future__ import annotations

import threading

from ..histogram import Histogram

SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class Metrics:
    """All that is counted. ``waiting`` and ``running`` are requests now, ``sound`` seconds that were worked through."""

    def __init__(self) -> None:
        self.waiting = 0
        self.running = 0
        self.cancelled = 0
        self.requests: dict[int, int] = {}
        self.latency = Histogram(SECONDS)
        self.queued = Histogram(SECONDS)
        self.sound = 0.0
        self.tokens = 0
        self._lock = threading.Lock()

    def answered(self, status: int, seconds: float) -> None:
        """One request has its answer."""
        self.requests[status] = self.requests.get(status, 0) + 1
        self.latency.add(seconds)

    def worked(self, seconds: float, tokens: int) -> None:
        """A piece of sound became text; from any thread."""
        with self._lock:
            self.sound += seconds
            self.tokens += tokens

    def render(self) -> bytes:
        """The page."""
        plain: list[tuple[str, str, float]] = [
            ("whisper_queue_size", "gauge", self.waiting),
            ("whisper_running", "gauge", self.running),
            ("whisper_audio_seconds_total", "counter", round(self.sound, 3)),
            ("whisper_generated_tokens_total", "counter", self.tokens),
            ("whisper_cancelled_total", "counter", self.cancelled),
        ]
        lines: list[str] = []
        for name, kind, value in plain:
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        lines.append("# TYPE whisper_requests_total counter")
        lines += [f'whisper_requests_total{{status="{s}"}} {n}' for s, n in sorted(self.requests.items())]
        lines += self.latency.lines("whisper_request_seconds")
        lines += self.queued.lines("whisper_queue_seconds")
        return ("\n".join(lines) + "\n").encode()
