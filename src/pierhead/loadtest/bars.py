"""A report as bars of text for a terminal; pure, prints nothing."""

from __future__ import annotations

from collections.abc import Sequence

from pierhead.loadtest.report import Report, Row

_EIGHTHS = " ▏▎▍▌▋▊▉"
_SHADES = "█▓░"
_RATES = (("output_tps", "Output tokens/s"), ("rps", "Requests/s"))
_TIMES = (("ttft", "Time to first token, ms"), ("itl", "Between tokens, ms"), ("e2e", "Whole answer, ms"))


def draw(report: Report, width: int) -> list[str]:
    """Lines of a chart: throughput, then the times with p50, p95 and p99 in one bar of three shades."""
    lines: list[str] = []
    for name, title in _RATES:
        if any(row.figures.get(name) for row in report.results):
            lines += [title, *_rates(report.results, name, width), ""]
            break
    times = [t for t in _TIMES if t[0] != "e2e" or not any("ttft_p50_ms" in r.figures for r in report.results)]
    for name, title in times:
        if any(f"{name}_p50_ms" in row.figures for row in report.results):
            lines += [f"{title}  ({_SHADES[0]} p50  {_SHADES[1]} p95  {_SHADES[2]} p99)"]
            lines += [*_times(report.results, name, width), ""]
    return lines[:-1]


def _rates(rows: Sequence[Row], name: str, width: int) -> list[str]:
    label = max(len(row.load) for row in rows)
    values = [row.figures.get(name, 0.0) for row in rows]
    room = max(10, width - label - 14)
    most = max(values) or 1.0
    return [
        f"  {row.load.rjust(label)}  {bar(value / most, room)} {short(value)}"
        for row, value in zip(rows, values, strict=True)
    ]


def _times(rows: Sequence[Row], name: str, width: int) -> list[str]:
    label = max(len(row.load) for row in rows)
    room = max(10, width - label - 28)
    most = max(row.figures.get(f"{name}_p99_ms", 0.0) for row in rows) or 1.0
    lines: list[str] = []
    for row in rows:
        values = [row.figures.get(f"{name}_p{p}_ms", 0.0) for p in (50, 95, 99)]
        ends = [round(value / most * room) for value in values]
        drawn = "".join(shade * (end - start) for shade, start, end in zip(_SHADES, [0, *ends[:-1]], ends, strict=True))
        lines.append(f"  {row.load.rjust(label)}  {drawn or '▏'} {' · '.join(short(v) for v in values)}")
    return lines


def bar(share: float, room: int) -> str:
    """A bar of ``share`` of ``room`` columns, to an eighth of a column."""
    eighths = round(max(0.0, min(share, 1.0)) * room * 8)
    whole, part = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[part] if part else "") or "▏"


def short(value: float) -> str:
    """A number of about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
