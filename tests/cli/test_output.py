"""What programs and pipes read: JSON from every verb that has data, quiet ends, text that steers no terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pierhead.cli.bench_output import columns
from pierhead.cli.models import nearest
from pierhead.cli.output import age, duration, fitting, number, print_error, printable, several, size, wrapped
from pierhead.errors import EngineFailed, NotFound
from pierhead.paths import Paths

Pier = Callable[..., subprocess.CompletedProcess[str]]
Stocked = tuple[Pier, Paths, dict[str, str]]

VERBS = [
    "ps", "list", "df", "status", "version", "doctor", "key list", "service status", "inspect smollm2",
    "cp smollm2 twin", "rm twin", "key create k", "key revoke k", "stop --all",
    "run smollm2 Hi --max-tokens 2", "stats --no-stream", "logs smollm2 --tail 1",
]  # fmt: skip


@pytest.mark.model
def test_every_verb_with_data_prints_json(stocked: Stocked) -> None:
    for verb in VERBS:
        done = stocked[0](*verb.split(), "--json")
        assert done.returncode == 0, (verb, done.stderr)
        json.loads(done.stdout)


@pytest.mark.model
def test_a_pull_prints_its_events(stocked: Stocked, smollm2: Path) -> None:
    done = stocked[0]("pull", str(smollm2), "--name", "again", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["type"] == "pull_done"
    assert events[-1]["name"] == "again"
    stocked[0]("rm", "again")


@pytest.mark.model
def test_names_are_completed_from_the_store(stocked: Stocked) -> None:
    done = stocked[0](_PIER_COMPLETE="bash_complete", COMP_WORDS="pier run smo", COMP_CWORD="2")
    assert done.stdout.strip() == "plain,smollm2"


@pytest.mark.model
def test_a_reader_that_leaves_ends_the_command_quietly(stocked: Stocked) -> None:
    for verb in (["list"], ["--help"], ["inspect", "smollm2", "--json"]):
        made = subprocess.Popen(
            [sys.executable, "-m", "pierhead.cli.main", *verb],
            env=stocked[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert made.stdout is not None
        assert made.stderr is not None
        made.stdout.close()
        said = made.stderr.read()
        made.stderr.close()
        assert made.wait(30) in (1, 141)
        assert said == ""


def test_a_full_output_is_an_error(bare: Pier) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pierhead.cli.main", "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 8
    assert b"cannot write" in done.stderr
    assert b"Traceback" not in done.stderr


def test_foreign_text_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[2Jb\x07\x9b1mc\r\n\td\x7f") == "a[2Jb1mc\n\td"
    print_error(EngineFailed("it \x1b]0;died\x07", data={"log": ["last \x1b[31mwords"]}), as_json=False)
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "last [31mwords" in said


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(98362432), "98.4 MB"),
        (size(999_999), "1.0 MB"),
        (size(7e12), "7.0 TB"),
        (number(134515008), "134.5M"),
        (number(None), "0"),
        (several(1, "file"), "1 file"),
        (several(0, "file"), "0 files"),
        (duration(59.4), "59 s"),
        (duration(59.9), "1 min"),
        (duration(7200), "2 h"),
        (age(None), "never"),
        (age("2020-01-01T00:00:00Z")[-3:], "ago"),
    ],
)
def test_figures_are_for_people(made: str, wanted: str) -> None:
    assert made == wanted


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (80, [0, 1, 2, 3]),
        (40, [0, 1, 2, 3]),  # the name may wrap, in half of the room
        (30, [0, 1, 2]),
        (12, [0, 1]),
        (1, [0, 1]),  # what is not to spare stays
    ],
)
def test_a_narrow_terminal_loses_columns_before_names_are_cut_to_pieces(room: int, kept: list[int]) -> None:
    assert fitting([50, 6, 4, 4], room, fold=[0], spare=[3, 2]) == kept


def test_a_name_that_no_source_has_leads_to_its_like_in_the_store() -> None:
    missing = NotFound("there is no model 'pirat' in the store", hint="Did you mean 'pirate'? Type `pier pull pirat`.")
    told = nearest(NotFound("no catalog has 'pirat'", hint="Any GGUF works."), missing)
    assert told.hint == "Did you mean 'pirate' of the store? Any GGUF works."
    nothing = NotFound("there is no model 'x' in the store", hint="Type `pier pull x`.")
    assert nearest(NotFound("no catalog has 'x'", hint="Any."), nothing).hint == "Any."


def test_lines_end_between_words_but_a_digest_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "30")
    digest = "Digest  sha256:" + "0" * 64
    assert wrapped(digest, Screen(), 8) == digest
    assert wrapped("Memory  weights of a model and of its cache", Screen(), 8).splitlines() == [
        "Memory  weights of a model and",
        "        of its cache",
    ]


def test_an_error_after_events_is_one_more_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(EngineFailed("it died", data={"log": ["one", "two"]}), as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["error"]["data"]["log"] == ["one", "two"]


@pytest.mark.parametrize(("room", "shown"), [(200, 15), (80, 8)])
def test_the_figures_of_a_load_test_fit_a_terminal(room: int, shown: int) -> None:
    head, spare = columns(streamed=True)
    widths = [max(len(name), 6) for name in head]
    widths[0] = len("16 at once")
    kept = fitting(widths, room, (), spare)
    assert sum(widths[i] for i in kept) + 2 * (len(kept) - 1) <= room
    assert len(kept) == shown
    assert {0, 1, 3, 4, 6, 9, 12} <= set(kept)
