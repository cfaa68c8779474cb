"""What a load test writes down and reads again: one flat row for each load, with the figures of each round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from pierhead.errors import CorruptData, NotFound
from pierhead.loadtest.drive import Pass
from pierhead.loadtest.figures import errors, figures, percentile, reasons

KIND = "pierhead-bench/1"
_BUSY = 0.85  # of a core: beyond it the generator may be what is slow
_LATE_MS = 20.0
_BEHIND = 0.9


class Row(msgspec.Struct, kw_only=True):
    """One load. ``figures`` are of all rounds together, ``rounds`` has for each figure its value in every round."""

    load: str
    concurrency: int = 0
    rate: float = 0.0
    requests: int = 0
    failed: int = 0
    errors: dict[str, int] = {}
    reasons: dict[str, str] = {}
    seconds: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    figures: dict[str, float] = {}
    rounds: dict[str, list[float]] = {}
    generator_cpu: float = 0.0
    generator_late_p99_ms: float = 0.0
    notes: list[str] = []


class Report(msgspec.Struct, kw_only=True):
    """A whole test, as ``--json`` prints and ``--save`` keeps it."""

    kind: str = KIND
    created: str = ""
    pier: str = ""
    model: str = ""
    task: str = ""
    url: str = ""
    host: str = ""
    settings: dict[str, str | int | float | bool] = {}
    results: list[Row] = []


def rows(passes: Sequence[Pass]) -> list[Row]:
    """A row for each load, in the order in which they first ran."""
    grouped: dict[str, list[Pass]] = {}
    for one in passes:
        grouped.setdefault(one.load.name, []).append(one)
    return [_row(name, group) for name, group in grouped.items()]


def _row(name: str, group: list[Pass]) -> Row:
    answers = [a for p in group for a in p.answers]
    good = [a for a in answers if not a.error]
    each = [figures([p]) for p in group]
    late = sorted(x for p in group for x in p.late)
    load = group[0].load
    row = Row(
        load=name,
        concurrency=load.concurrency,
        rate=load.rate,
        requests=len(answers),
        failed=len(answers) - len(good),
        errors=errors(answers),
        reasons=reasons(answers),
        seconds=round(sum(p.seconds for p in group), 3),
        prompt_tokens=round(sum(a.prompt_tokens for a in good) / max(len(good), 1), 1),
        output_tokens=round(sum(a.output_tokens for a in good) / max(len(good), 1), 1),
        figures=figures(group),
        rounds={f: [e[f] for e in each] for f in each[0] if all(f in e for e in each)},
        generator_cpu=round(max(p.cpu for p in group), 3),
        generator_late_p99_ms=round(1000 * percentile(late, 0.99), 2) if late else 0.0,
    )
    row.notes = notes(row)
    return row


def notes(row: Row) -> list[str]:
    """What a reader of the figures must know."""
    found: list[str] = []
    if row.generator_cpu > _BUSY:
        found.append(
            f"{row.load}: the load generator was busy ({row.generator_cpu:.0%} of a core): it may be the limit"
        )
    if row.generator_late_p99_ms > _LATE_MS:
        found.append(
            f"{row.load}: requests left up to {row.generator_late_p99_ms:.0f} ms late (p99); their times count it"
        )
    if row.rate and row.figures.get("rps", 0.0) < _BEHIND * row.rate:
        rate = row.figures.get("rps", 0.0)
        found.append(f"{row.load}: the server kept up with {rate:.2f}/s only, so waiting grows with the test's length")
    return found


def encode(report: Report) -> bytes:
    """The file of a report."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def load(path: Path) -> Report:
    """A report that ``--save`` kept; NotFound or CorruptData."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as exc:
        raise NotFound(
            f"cannot read {path}: {exc.strerror}", hint="Keep one with: pier bench MODEL --save FILE"
        ) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        hint = "Keep one with: pier bench MODEL --save FILE"
        raise CorruptData(f"{path} is not the report of a load test: {exc}", hint=hint) from exc
    if report.kind != KIND:
        raise CorruptData(f"{path} is not the report of a load test: its kind is '{report.kind[:40]}'")
    return report
