"""Whether a figure changed beyond the noise of the rounds: Welch's interval of two means; pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, variance

from pierhead.loadtest.figures import FIGURES
from pierhead.loadtest.report import Report, Row

# Student's t for 99 %, two-sided, for 1 … 30 degrees of freedom. A test compares dozens of figures: at 95 % one in
# twenty would seem to have changed by chance alone.
_T99 = (
    *(63.657, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169),
    *(3.106, 3.055, 3.012, 2.977, 2.947, 2.921, 2.898, 2.878, 2.861, 2.845),
    *(2.831, 2.819, 2.807, 2.797, 2.787, 2.779, 2.771, 2.763, 2.756, 2.750),
)
_T99_ANY = 2.660  # for 60; a little wide beyond


@dataclass(frozen=True)
class Change:
    """One figure of one load, then and now.

    ``change`` is relative to ``old``; the truth lies between ``low`` and ``high`` with 99 %. ``verdict`` is ``better``,
    ``worse``, ``noise`` (the interval holds zero), or ``unknown`` where too few rounds tell nothing.
    """

    load: str
    figure: str
    old: float
    new: float
    change: float
    low: float
    high: float
    verdict: str


def compare(old: Report, new: Report) -> list[Change]:
    """Every figure that both have, in the order of ``new``."""
    before = {row.load: row for row in old.results}
    return [
        _change(name, before[row.load], row)
        for row in new.results
        if row.load in before
        for name in FIGURES
        if name in row.figures and name in before[row.load].figures
    ]


def _change(name: str, old: Row, new: Row) -> Change:
    was, now = old.figures[name], new.figures[name]
    bounds = interval(old.rounds.get(name, []), new.rounds.get(name, []))
    scale = was or 1.0
    if bounds is None:
        return Change(new.load, name, was, now, (now - was) / scale, -math.inf, math.inf, "unknown")
    low, high = bounds[0] / scale, bounds[1] / scale
    verdict = "noise" if low <= 0 <= high else "better" if (low > 0) == FIGURES[name][2] else "worse"
    return Change(new.load, name, was, now, (now - was) / scale, low, high, verdict)


def interval(old: list[float], new: list[float]) -> tuple[float, float] | None:
    """Where the difference of the means lies with 99 %, by Welch; None with fewer than two rounds on a side."""
    if min(len(old), len(new)) < 2:
        return None
    difference = fmean(new) - fmean(old)
    a, b = variance(old) / len(old), variance(new) / len(new)
    if a + b == 0:
        return difference, difference
    freedom = (a + b) ** 2 / (a * a / (len(old) - 1) + b * b / (len(new) - 1))
    reach = _t99(freedom) * math.sqrt(a + b)
    return difference - reach, difference + reach


def _t99(freedom: float) -> float:
    at = max(1, int(freedom))  # rounded down: rather too wide than too narrow
    return _T99[at - 1] if at <= len(_T99) else (_T99[-1] if at < 60 else _T99_ANY)


def unlike(old: Report, new: Report) -> list[str]:
    """What differs between two tests beyond what they measured, which may explain a change."""
    names = sorted(old.settings.keys() | new.settings.keys())
    found = [
        f"{name}: {old.settings.get(name, '-')} then, {new.settings.get(name, '-')} now"
        for name in names
        if old.settings.get(name) != new.settings.get(name)
    ]
    if old.task != new.task:
        found.append(f"task: {old.task} then, {new.task} now")
    if old.host != new.host:
        found.append("another machine")
    return found
