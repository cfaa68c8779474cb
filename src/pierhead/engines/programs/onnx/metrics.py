"""Counters and histograms in Prometheus' text form; a few numbers, so no library."""

from __future__ import annotations

from ..histogram import Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All that is counted. ``waiting`` and ``running`` are texts or tensors now, ``tokens`` what was read of texts."""

    def __init__(self) -> None:
        self.waiting = 0
        self.running = 0
        self.requests: dict[int, int] = {}
        self.tokens = 0
        self.padding = 0
        self.truncated = 0
        self.latency = Histogram(SECONDS)
        self.queued = Histogram(SECONDS)
        self.batches = Histogram(SIZES)

    def answered(self, status: int, seconds: float) -> None:
        """One request has its answer."""
        self.requests[status] = self.requests.get(status, 0) + 1
        self.latency.add(seconds)

    def render(self) -> bytes:
        """The page."""
        plain: list[tuple[str, str, int]] = [
            ("onnx_queue_size", "gauge", self.waiting),
            ("onnx_running", "gauge", self.running),
            ("onnx_prompt_tokens_total", "counter", self.tokens),
            ("onnx_padding_tokens_total", "counter", self.padding),
            ("onnx_truncated_total", "counter", self.truncated),
        ]
        lines: list[str] = []
        for name, kind, value in plain:
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        lines.append("# TYPE onnx_requests_total counter")
        lines += [f'onnx_requests_total{{status="{s}"}} {n}' for s, n in sorted(self.requests.items())]
        lines += self.latency.lines("onnx_request_seconds")
        lines += self.queued.lines("onnx_queue_seconds")
        lines += self.batches.lines("onnx_batch_size")
        return ("\n".join(lines) + "\n").encode()
