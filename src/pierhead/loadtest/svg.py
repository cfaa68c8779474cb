"""Reports as one SVG picture with axes and units, for light and dark pages; writes no file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from pierhead.loadtest.bars import short
from pierhead.loadtest.report import Report, Row

Height = Callable[[float], float]
_WIDTH, _HEAD, _FOOT = 960, 64, 34
_PANEL, _TALL, _LEFT, _TOP, _RIGHT, _BOTTOM = 480, 290, 64, 40, 62, 46
_STYLE = """
svg{--page:#fff;--ink:#1f2328;--soft:#656d76;--line:#d8dee4;--a:#0969da;--b:#bf5b00;--c:#a40e4c;background:var(--page)}
@media (prefers-color-scheme:dark){svg{--page:#0d1117;--ink:#e6edf3;--soft:#8d96a0;--line:#30363d;--a:#58a6ff;
--b:#f0883e;--c:#ff7b9c}}
text{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink)}
.title{font-size:18px;font-weight:600}.head{font-weight:600}.soft{fill:var(--soft);font-size:12px}
.page{fill:var(--page)}.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
.line{fill:none;stroke-width:2}.old{stroke-dasharray:5 4;opacity:.6}
.a{stroke:var(--a)}.b{stroke:var(--b)}.c{stroke:var(--c)}
.dot{stroke-width:0}.dot.a{fill:var(--a)}.dot.b{fill:var(--b)}.dot.c{fill:var(--c)}
.name.a{fill:var(--a);stroke:none}.name.b{fill:var(--b);stroke:none}.name.c{fill:var(--c);stroke:none}
"""


@dataclass(frozen=True)
class Panel:
    """One small chart: a title with its unit, and (class, label, figure) of each line."""

    title: str
    lines: tuple[tuple[str, str, str], ...]


_PANELS = (
    Panel("Output tokens per second", (("a", "", "output_tps"),)),
    Panel("Requests per second", (("a", "", "rps"),)),
    *(
        Panel(f"{title}, milliseconds", tuple((c, p, f"{name}_{p}_ms") for c, p in zip("abc", ps, strict=True)))
        for name, title, ps in (
            ("ttft", "Time to first token", ("p50", "p95", "p99")),
            ("itl", "Between tokens", ("p50", "p95", "p99")),
            ("e2e", "Whole answer", ("p50", "p95", "p99")),
        )
    ),
)


def draw(report: Report, old: Report | None = None) -> str:
    """The picture of a report; the lines of ``old`` are dashed."""
    panels = [p for p in _PANELS if any(_has(row, p) for row in report.results)]
    if len(panels) > 4:
        panels.remove(_PANELS[1])
    tall = _HEAD + _TALL * math.ceil(len(panels) / 2) + _FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {tall}" role="img" aria-labelledby="t d">',
        f'<title id="t">{escape(_title(report))}</title><desc id="d">{escape(_told(report))}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{tall}"/>',
        f'<text class="title" x="24" y="32">{escape(_title(report))}</text>',
        f'<text class="soft" x="24" y="52">{escape(_told(report))}</text>',
    ]
    for i, panel in enumerate(panels):
        x, y = i % 2 * _PANEL, _HEAD + i // 2 * _TALL
        parts += [f'<g transform="translate({x},{y})">', *_panel(panel, report, old), "</g>"]
    if old is not None:
        told = f"dashed: {old.model}, {old.created[:16].replace('T', ' ')}"
        parts.append(f'<text class="soft" x="24" y="{tall - 14}">{escape(told)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _has(row: Row, panel: Panel) -> bool:
    return bool(row.figures.get(panel.lines[0][2]))


def _title(report: Report) -> str:
    return f"{report.model}: {report.task} under load"


def _told(report: Report) -> str:
    rows = [row for row in report.results if row.requests > row.failed]
    prompt = sum(r.prompt_tokens for r in rows) / max(len(rows), 1)
    output = sum(r.output_tokens for r in rows) / max(len(rows), 1)
    lengths = f"prompts of {prompt:.0f} tokens" + (f", answers of {output:.0f}" if output else "")
    made = f"{sum(r.requests for r in report.results):,} requests, {sum(r.failed for r in report.results):,} failed"
    return " · ".join(part for part in (lengths, made, report.created[:16].replace("T", " "), report.host) if part)


def _panel(panel: Panel, report: Report, old: Report | None) -> list[str]:
    rows = report.results
    figures = [name for *_, name in panel.lines]
    shown = [*rows, *(old.results if old else ())]
    top, step = ceiling(max(row.figures.get(name, 0.0) for row in shown for name in figures))
    right, low = _PANEL - _RIGHT, _TALL - _BOTTOM
    places = {row.load: _LEFT + (right - _LEFT) * (i + 0.5) / len(rows) for i, row in enumerate(rows)}

    def height(value: float) -> float:
        return low - (low - _TOP) * value / top

    parts = [f'<text class="head" x="{_LEFT - 40}" y="22">{escape(panel.title)}</text>']
    for i in range(round(top / step) + 1):
        y = height(i * step)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{i * step:,g}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{low}" y2="{low}"/>')
    for row in rows:
        name = f"{row.rate:g}/s" if row.rate else str(row.concurrency)
        parts.append(f'<text class="soft" x="{places[row.load]:.1f}" y="{low + 18}" text-anchor="middle">{name}</text>')
    parts.append(
        f'<text class="soft" x="{(_LEFT + right) / 2}" y="{low + 36}" text-anchor="middle">{_axis(rows)}</text>'
    )
    for kind, _, figure in panel.lines if old is not None else ():
        assert old is not None
        parts += _lines([r for r in old.results if r.load in places], places, figure, height, f"{kind} old")
    for kind, _, figure in panel.lines:
        parts += _lines(rows, places, figure, height, kind)
    return parts + _labels(panel, rows[-1], height, places[rows[-1].load])


def _axis(rows: Sequence[Row]) -> str:
    names = [name for name, has in (("requests at once", any(r.concurrency for r in rows)),) if has]
    return " · ".join([*names, *(["arrivals per second"] if any(r.rate for r in rows) else [])])


def _lines(rows: Sequence[Row], places: dict[str, float], figure: str, height: Height, kind: str) -> list[str]:
    """A line for closed loops and one for open loops, with a dot at each value."""
    parts: list[str] = []
    for group in ([r for r in rows if not r.rate], [r for r in rows if r.rate]):
        dots = [(places[r.load], height(r.figures[figure]), r) for r in group if figure in r.figures]
        if len(dots) > 1:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in dots)
            parts.append(f'<polyline class="line {kind}" points="{points}"/>')
        parts += [
            f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(r.load)}: '
            f"{short(r.figures[figure])}</title></circle>"
            for x, y, r in dots
        ]
    return parts


def _labels(panel: Panel, last: Row, height: Height, x: float) -> list[str]:
    """The name and last value of each line at its end, apart from each other."""
    found = sorted(
        (
            (height(last.figures[f]) + 4, kind, f"{name} {short(last.figures[f])}".strip())
            for kind, name, f in panel.lines
            if f in last.figures
        ),
        reverse=True,
    )
    parts: list[str] = []
    below = math.inf
    for y, kind, text in found:
        below = min(y, below - 15)
        parts.append(f'<text class="name {kind}" x="{x + 9:.1f}" y="{below:.1f}">{escape(text)}</text>')
    return parts


def ceiling(most: float) -> tuple[float, float]:
    """The top of an axis that holds ``most``, and the step between its lines: round numbers, three to six of them."""
    if most < 1e-9:
        return 1.0, 0.5
    raw = most / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    return math.ceil(most / step - 1e-9) * step, step
