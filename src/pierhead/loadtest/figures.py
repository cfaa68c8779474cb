"""The figures of what was measured: rates, and percentiles in milliseconds; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pierhead.loadtest.answer import Answer
from pierhead.loadtest.drive import Pass

# Figure → (what it is, unit, whether more is better). The order is that of tables and files.
FIGURES: dict[str, tuple[str, str, bool]] = {
    "rps": ("requests", "/s", True),
    "output_tps": ("output tokens", "/s", True),
    "total_tps": ("all tokens", "/s", True),
    "ttft_mean_ms": ("time to first token, mean", "ms", False),
    "ttft_p50_ms": ("time to first token, p50", "ms", False),
    "ttft_p95_ms": ("time to first token, p95", "ms", False),
    "ttft_p99_ms": ("time to first token, p99", "ms", False),
    "itl_mean_ms": ("between tokens, mean", "ms", False),
    "itl_p50_ms": ("between tokens, p50", "ms", False),
    "itl_p95_ms": ("between tokens, p95", "ms", False),
    "itl_p99_ms": ("between tokens, p99", "ms", False),
    "tpot_p50_ms": ("time per output token, p50", "ms", False),
    "e2e_mean_ms": ("whole answer, mean", "ms", False),
    "e2e_p50_ms": ("whole answer, p50", "ms", False),
    "e2e_p95_ms": ("whole answer, p95", "ms", False),
    "e2e_p99_ms": ("whole answer, p99", "ms", False),
    "failed_share": ("failed", "", False),
}


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` of ``ordered`` lies, between neighbours in proportion."""
    at = (len(ordered) - 1) * share
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def figures(passes: Sequence[Pass]) -> dict[str, float]:
    """The figures of passes of the same load, taken together; what was not measured is left out."""
    answers = [a for p in passes for a in p.answers]
    good = [a for a in answers if not a.error]
    seconds = sum(p.seconds for p in passes)
    found: dict[str, float] = {}
    if seconds > 0:
        output = sum(a.output_tokens for a in good)
        found["rps"] = len(good) / seconds
        found["output_tps"] = output / seconds
        found["total_tps"] = (output + sum(a.prompt_tokens for a in good)) / seconds
    streamed = [a for a in good if a.streamed and a.first]
    found |= _spread("ttft", [a.first - a.intended for a in streamed])
    found |= _spread("itl", [gap for a in streamed for gap in a.gaps])
    steps = sorted((a.last - a.first) / (a.output_tokens - 1) for a in streamed if a.output_tokens > 1 and a.gaps)
    if steps:
        found["tpot_p50_ms"] = 1000 * percentile(steps, 0.5)
    found |= _spread("e2e", [a.ended - a.intended for a in good])
    if answers:
        found["failed_share"] = (len(answers) - len(good)) / len(answers)
    return {name: round(found[name], 4) for name in FIGURES if name in found}


def _spread(name: str, seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    seconds.sort()
    found = {f"{name}_mean_ms": 1000 * sum(seconds) / len(seconds)}
    for share in (50, 95, 99):
        found[f"{name}_p{share}_ms"] = 1000 * percentile(seconds, share / 100)
    return found


def errors(answers: Iterable[Answer]) -> dict[str, int]:
    """Failures by kind, the most frequent first."""
    return dict(Counter(a.error for a in answers if a.error).most_common())


def reasons(answers: Iterable[Answer]) -> dict[str, str]:
    """For each kind of failure the first reason that a server gave."""
    found: dict[str, str] = {}
    for answer in answers:
        if answer.error and answer.reason:
            found.setdefault(answer.error, answer.reason)
    return found
