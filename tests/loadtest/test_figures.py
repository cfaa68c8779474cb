"""Figures, arrivals, prompts, comparison and pictures: pure, against values known beforehand."""

from __future__ import annotations

import random
import statistics
import xml.etree.ElementTree as ET
from array import array
from itertools import islice, pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import CorruptData, NotFound, UsageError
from pierhead.loadtest import bars, prompts, report, svg
from pierhead.loadtest.answer import Answer
from pierhead.loadtest.compare import compare, interval, unlike
from pierhead.loadtest.drive import Pass
from pierhead.loadtest.figures import figures, percentile
from pierhead.loadtest.plan import Load, Plan, arrivals


def answer(at: float, first: float, gaps: list[float], prompt: int = 10) -> Answer:
    last = at + first + sum(gaps)
    return Answer(
        True, at, at, at + first, last, last, 200, prompt, len(gaps) + 1, len(gaps) + 1, gaps=array("d", gaps)
    )


def test_figures_are_what_was_measured() -> None:
    measured = Pass(Load(concurrency=2), 0, seconds=2.0)
    for i in range(4):
        measured.add(answer(i, 0.1 * (i + 1), [0.02, 0.04]))
    lost = Answer(True, 0.0)
    lost.fail("timeout")
    measured.add(lost)
    found = figures([measured])
    assert found["rps"] == 2.0
    assert found["output_tps"] == 6.0
    assert found["total_tps"] == 26.0
    assert found["ttft_p50_ms"] == pytest.approx(250)
    assert found["itl_p50_ms"] == pytest.approx(30)
    assert found["tpot_p50_ms"] == pytest.approx(30)
    assert found["e2e_p99_ms"] == pytest.approx(457, abs=1)
    assert found["failed_share"] == 0.2


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    values.sort()
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for share in (50, 95, 99):
        assert percentile(values, share / 100) == pytest.approx(cuts[share - 1], rel=1e-9, abs=1e-9)


def test_arrivals_are_the_same_for_a_seed_and_come_at_the_rate() -> None:
    first = list(arrivals(50, 7, seconds=100))
    assert first == list(arrivals(50, 7, seconds=100))
    assert first != list(arrivals(50, 8, seconds=100))
    assert len(first) == pytest.approx(5000, rel=0.05)
    waits = [b - a for a, b in pairwise(first)]
    assert statistics.stdev(waits) == pytest.approx(statistics.fmean(waits), rel=0.05), "Poisson: as wide as long"
    assert len(list(arrivals(50, 7, count=12))) == 12


def test_every_load_has_its_turn_in_every_round() -> None:
    plan = Plan((Load(concurrency=1), Load(rate=2.5)), rounds=2)
    assert [(n, load.name) for n, load in plan.passes] == [
        (0, "1 at once"),
        (0, "2.5/s"),
        (1, "1 at once"),
        (1, "2.5/s"),
    ]


def test_datasets_of_the_field_are_read(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    lines = (
        '{"prompt": "one", "output_tokens": 9}',
        '"two"',
        '{"messages": [{"role": "user", "content": "three"}]}',
        "",
        '{"conversations": [{"from": "human", "value": "four"}]}',
    )
    file.write_text("\n".join(lines))
    one, two, three, four = prompts.read_dataset(file)
    assert (one.text, one.output_tokens, two.text, four.text) == ("one", 9, "two", "four")
    assert three.messages == ({"role": "user", "content": "three"},)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[]", "null", '{"prompt": 3}', "\0"])
def test_a_dataset_without_prompts_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(UsageError):
        prompts.read_dataset(file)


def test_the_same_seed_makes_the_same_requests() -> None:
    shape = prompts.Shape(20, 4)
    made = [list(islice(prompts.bodies("chat", "m", shape, 9, seed), 5)) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def made(rps: list[float], ttft: list[float], **more: object) -> report.Report:
    figs = {"rps": statistics.fmean(rps), "ttft_p50_ms": statistics.fmean(ttft)}
    row = report.Row(load="2 at once", concurrency=2, figures=figs, rounds={"rps": rps, "ttft_p50_ms": ttft})
    return report.Report(model="m", task="chat", results=[row], **more)  # pyright: ignore[reportArgumentType]


def test_a_change_beyond_the_noise_is_told_from_one_within() -> None:
    old = made([10.0, 10.1, 9.9, 10.0], [100, 130, 90, 110])
    new = made([12.0, 12.1, 11.9, 12.0], [110, 95, 128, 105])
    rps, ttft = compare(old, new)
    assert (rps.verdict, ttft.verdict) == ("better", "noise")
    assert rps.low < rps.change < rps.high
    assert rps.change == pytest.approx(0.2)
    assert [c.verdict for c in compare(new, old)] == ["worse", "noise"]


def test_higher_times_are_worse() -> None:
    old, new = made([1, 1.01], [10, 10.1, 9.9]), made([1, 1.01], [20, 20.1, 19.9])
    assert compare(old, new)[1].verdict == "worse"


def test_one_round_tells_nothing() -> None:
    assert {c.verdict for c in compare(made([1], [1]), made([2], [2]))} == {"unknown"}


def test_noise_alone_is_seldom_taken_for_a_change() -> None:
    chance = random.Random(5)
    wrong = 0
    for _ in range(2000):
        old, new = ([chance.gauss(100, 8) for _ in range(3)] for _ in range(2))
        found = interval(old, new)
        assert found is not None
        wrong += not found[0] <= 0 <= found[1]
    assert wrong / 2000 < 0.015


def test_what_differs_between_two_tests_is_named() -> None:
    old, new = made([1], [1], settings={"seed": 1}), made([1], [1], settings={"seed": 2}, host="other")
    assert unlike(old, new) == ["seed: 1 then, 2 now", "another machine"]


def whole() -> report.Report:
    rows = [
        report.Row(
            load=load.name,
            concurrency=load.concurrency,
            rate=load.rate,
            requests=10,
            figures={
                "rps": 3.0 * i,
                "output_tps": 90.0 * i,
                **{f"{n}_p{p}_ms": 7.0 * i * p for n in ("ttft", "itl", "e2e") for p in (50, 95, 99)},
            },
        )
        for i, load in enumerate((Load(concurrency=1), Load(concurrency=2), Load(rate=4)), 1)
    ]
    return report.Report(model="<m & co>", task="chat", created="2026-11-25T10:00:00", results=rows)


def test_the_picture_is_well_formed_and_names_axes_and_units() -> None:
    drawn = svg.draw(whole(), whole())
    root = ET.fromstring(drawn)
    texts = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<m & co>: chat under load" in texts
    assert "Time to first token, milliseconds" in texts
    assert "requests at once · arrivals per second" in texts
    assert "prefers-color-scheme:dark" in drawn


@given(st.floats(0, 1e9))
def test_an_axis_holds_its_values_with_a_few_round_steps(most: float) -> None:
    top, step = svg.ceiling(most)
    assert top >= most * 0.999
    assert top / step <= 6


def test_bars_keep_to_the_width() -> None:
    for width in (40, 80, 120):
        assert max(map(len, bars.draw(whole(), width))) <= max(width, 60)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_bytes(report.encode(whole()))
    assert report.load(file) == whole()


@pytest.mark.parametrize("data", [b"", b"{}x", b"\xff", b'{"kind": "other"}', b'{"results": 3}'])
def test_what_is_no_report_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "r.json"
    file.write_bytes(data)
    with pytest.raises(CorruptData):
        report.load(file)
    with pytest.raises(NotFound):
        report.load(tmp_path / "none")


def test_a_report_of_nothing_can_be_drawn() -> None:
    lost = Answer(True, 0.0)
    lost.fail("connect", "refused")
    measured = Pass(Load(concurrency=1), 0, seconds=1.0)
    measured.add(lost)
    empty = report.Report(model="m", task="chat", results=report.rows([measured]))
    assert empty.results[0].errors == {"connect": 1}
    ET.fromstring(svg.draw(empty))
    bars.draw(empty, 80)
    assert msgspec.json.decode(report.encode(empty), type=report.Report) == empty
