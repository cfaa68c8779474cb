"""Counters and histograms of the gateway and their Prometheus text; fetches nothing itself."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pierhead.gateway.tally import Tally

_MODELS = 1000
_TTFT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_DURATION = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


def escape(value: str) -> str:
    """A label value as the exposition format wants it."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def labels(**pairs: str) -> str:
    """``{a="b",c="d"}``."""
    return "{" + ",".join(f'{k}="{escape(v)}"' for k, v in pairs.items()) + "}"


class Histogram:
    """Cumulative on output, per bucket inside; ``bounds`` in seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Record ``value`` seconds, seen ``times`` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def lines(self, name: str, model: str) -> Iterable[str]:
        """Samples of one model."""
        return self.sampled(name, labels(model=model))

    def sampled(self, name: str, at: str) -> Iterable[str]:
        """Samples with the labels ``at``."""
        seen = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            yield f'{name}_bucket{at[:-1]},le="{bound}"}} {seen}'
        yield f"{name}_sum{at} {self.total:.6f}"
        yield f"{name}_count{at} {seen}"


class ModelStats:
    """What happened to requests for one model since the gateway started."""

    __slots__ = ("aborted", "completion_tokens", "duration", "gap", "prompt_tokens", "retries", "status", "ttft")

    def __init__(self) -> None:
        self.status: dict[int, int] = {}
        self.aborted = 0
        self.retries = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.duration = Histogram(_DURATION)
        self.ttft = Histogram(_TTFT)
        self.gap = Histogram(_GAP)

    def finished(self, status: int, seconds: float) -> None:
        """One answer was delivered whole."""
        self.status[status] = self.status.get(status, 0) + 1
        self.duration.observe(seconds)


class Metrics:
    """All that the gateway itself counts; ``models`` has every route that is, and some that were."""

    def __init__(self) -> None:
        self.models: dict[str, ModelStats] = {}
        self.local: dict[int, int] = {}
        self.accepted = 0
        self.refused = 0
        self.open = 0
        self.relays = 0  # requests that an answer is being made for
        self.holds = 0
        self.dropped: Callable[[], int] = int  # log lines, spans and recordings that were given up
        self.tally: Tally | None = None
        self.lost: Callable[[], int] = int  # requests that the usage journal does not have

    def model(self, name: str) -> ModelStats:
        """The stats of ``name``, made on first use."""
        stats = self.models.get(name)
        if stats is None:
            stats = self.models[name] = ModelStats()
        return stats

    def keep(self, names: Iterable[str]) -> None:
        """Forget models that are none any more, once there are many of them."""
        if len(self.models) > _MODELS:
            routed = frozenset(names)
            self.models = {name: stats for name, stats in self.models.items() if name in routed}

    def answered(self, status: int) -> None:
        """The gateway answered by itself."""
        self.local[status] = self.local.get(status, 0) + 1

    def render(self, replicas: Iterable[tuple[str, str, int]]) -> str:
        """The exposition text; ``replicas`` are (model, replica, open requests)."""
        out: list[str] = []
        _family(out, "pierhead_gateway_connections_open", "gauge", "Client connections open now.", [f" {self.open}"])
        accepted = [f" {self.accepted}"]
        _family(out, "pierhead_gateway_connections_total", "counter", "Client connections accepted.", accepted)
        refused = [f" {self.refused}"]
        _family(out, "pierhead_gateway_connections_refused_total", "counter", "Connections over the limit.", refused)
        lost = [f" {self.lost()}"]
        _family(out, "pierhead_usage_lost_total", "counter", "Requests that the usage journal had no room for.", lost)
        dropped = [f" {self.dropped()}"]
        text = "Log lines, spans and recordings that were given up."
        _family(out, "pierhead_telemetry_dropped_total", "counter", text, dropped)
        local = [f'{{code="{c}"}} {n}' for c, n in sorted(self.local.items())]
        _family(out, "pierhead_gateway_answers_total", "counter", "Answers the gateway gave by itself.", local)
        busy = [f"{labels(model=m, replica=r)} {n}" for m, r, n in replicas]
        _family(out, "pierhead_replica_requests_open", "gauge", "Requests that run on a replica now.", busy)
        self._per_model(out)
        return "\n".join(out) + "\n"

    def families(self) -> Iterator[str]:
        """What is counted per key and operation, family by family."""
        return self.tally.render() if self.tally is not None else iter(())

    def _per_model(self, out: list[str]) -> None:
        models = sorted(self.models.items())
        by_code = [f"{labels(model=m, code=str(c))} {n}" for m, s in models for c, n in sorted(s.status.items())]
        _family(out, "pierhead_requests_total", "counter", "Requests answered, by status.", by_code)
        for name, text, field in (
            ("pierhead_requests_aborted_total", "Requests whose client or engine went away.", "aborted"),
            ("pierhead_upstream_retries_total", "Requests sent again after a stale connection.", "retries"),
            ("pierhead_prompt_tokens_total", "Prompt tokens that engines reported.", "prompt_tokens"),
            ("pierhead_completion_tokens_total", "Completion tokens that engines reported.", "completion_tokens"),
        ):
            _family(out, name, "counter", text, [f"{labels(model=m)} {getattr(s, field)}" for m, s in models])
        for name, text, field in (
            ("pierhead_request_duration_seconds", "From the whole request to the whole answer.", "duration"),
            ("pierhead_time_to_first_token_seconds", "From the whole request to the first streamed event.", "ttft"),
            ("pierhead_inter_token_seconds", "Between streamed events.", "gap"),
        ):
            out.append(f"# HELP {name} {text}\n# TYPE {name} histogram")
            for model, stats in models:
                histogram: Histogram = getattr(stats, field)
                out.extend(histogram.lines(name, model))


def _family(out: list[str], name: str, kind: str, text: str, samples: list[str]) -> None:
    out.append(f"# HELP {name} {text}\n# TYPE {name} {kind}")
    out.extend(name + sample for sample in samples)
