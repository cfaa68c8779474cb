"""Usage: every journalled request is in the sums exactly once, whoever is killed and whoever was away."""

from __future__ import annotations

import csv
import http.client
import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pierhead.daemon.usage import KEEP_DAYS, Usage
from pierhead.errors import UsageError
from pierhead.gateway.journal import Journal
from pierhead.gateway.journal_lines import files
from pierhead.gateway.outcome import Outcome
from pierhead.gateway.usage import Usage as Tokens

NAMES = {"key_a": "laptop", "key_b": "agent"}
FOLD = (
    "import sys; from pathlib import Path; from pierhead.daemon.usage import Usage\n"
    "usage = Usage(Path(sys.argv[1]), Path(sys.argv[2]), dict)\n"
    "print('up', flush=True)\n"
    "while True: usage.fold()"
)


def outcome(number: int = 0, *, at: float | None = None, key: str = "key_a", status: int = 200, **more) -> Outcome:
    given = {
        "id": f"req_{number}", "time": time.time() if at is None else at, "key": key, "operation": "chat",
        "dialect": "openai", "asked": "m", "model": "m", "replica": "r", "status": status, "ok": status < 500,
        "stream": False, "usage": Tokens(10, 3, 4, True), "cost": 25, "seconds": 0.5,
    }  # fmt: skip
    return Outcome(**(given | more))


@pytest.fixture
def usage(tmp_path: Path) -> Usage:
    return Usage(tmp_path / "usage.db", tmp_path / "journals", lambda: NAMES)


@pytest.fixture
def book(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journals")


def test_sums_are_kept_by_key_model_operation_and_day(usage, book):
    today, before = time.time(), time.time() - 86400
    for key, model, operation, at in (
        ("key_a", "m", "chat", today), ("key_a", "m", "chat", today), ("key_a", "n", "chat", before),
        ("key_b", "m", "embeddings", today), ("", "m", "chat", today),
    ):  # fmt: skip
        book.put(outcome(key=key, model=model, operation=operation, at=at))
    book.put(outcome(key="key_b", status=500))
    assert usage.fold() == 6
    assert usage.fold() == 0
    report = usage.report(("key",))
    assert [(r.key, r.key_name, r.requests, r.errors) for r in report.rows] == [
        ("", None, 1, 0), ("key_a", "laptop", 3, 0), ("key_b", "agent", 2, 1),
    ]  # fmt: skip
    assert (report.total.requests, report.total.prompt_tokens, report.total.cached_tokens) == (6, 60, 24)
    assert (report.total.cost, report.total.seconds) == (0.00015, 3.0)
    assert [(r.model, r.requests) for r in usage.report(("model",), key="laptop").rows] == [("m", 2), ("n", 1)]
    assert usage.report(("day", "operation"), model="m", since="1d").total.requests == 5
    assert len(usage.report(("day",)).rows) == 2
    assert usage.report((), since="2999-01-01").total.requests == 0


def test_revisions_of_a_model_are_told_apart_and_older_sums_are_taken_over(usage, book, tmp_path):
    old = sqlite3.connect(tmp_path / "usage.db")
    sums = ("requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens", "cost", "seconds")
    places = "day INTEGER, key TEXT, model TEXT, operation TEXT"
    old.execute(f"CREATE TABLE usage ({places}, {', '.join(sums)}, PRIMARY KEY (day, key, model, operation))")
    old.execute(
        "INSERT INTO usage VALUES (?, 'key_a', 'm', 'chat', 5, 1, 50, 20, 15, 100, 2.5)", (int(time.time() // 86400),)
    )
    old.commit()
    old.close()
    for revision in ("", "4fe1", "4fe1", "9b2c"):
        book.put(outcome(revision=revision))
    assert usage.fold() == 4
    assert [(r.revision, r.requests) for r in usage.report(("revision",)).rows] == [("", 6), ("4fe1", 2), ("9b2c", 1)]
    assert usage.report(("key",)).total.prompt_tokens == 90


def test_what_is_written_while_sums_are_made_comes_in_later_and_ended_journals_go(usage, book, tmp_path):
    book.put(outcome(1))
    usage.fold()
    book.put(outcome(2))
    usage.fold()
    assert usage.report(()).total.requests == 2
    assert len(files(tmp_path / "journals")) == 1
    book.put(outcome(3))
    book.close()
    usage.fold()
    assert usage.report(()).total.requests == 3
    assert files(tmp_path / "journals") == []


def test_old_sums_are_let_go(usage, book):
    book.put(outcome(at=time.time() - (KEEP_DAYS + 2) * 86400))
    book.put(outcome())
    usage.fold()
    assert usage.report(()).total.requests == 1


@pytest.mark.parametrize("asked", [{"by": ("keys",)}, {"since": "soon"}, {"since": "-3d"}])
def test_what_cannot_be_asked_is_told(usage, asked):
    with pytest.raises(UsageError):
        usage.report(**asked)


def test_a_journal_that_came_after_another_process_had_looked_is_not_counted_twice(usage, book, tmp_path, monkeypatch):
    book.put(outcome(1))
    stale = files(tmp_path / "journals")
    newer = Journal(tmp_path / "journals")
    newer.put(outcome(2))
    assert usage.fold() == 2
    with monkeypatch.context() as patched:
        patched.setattr("pierhead.daemon.usage.journal.files", lambda folder: stale)
        assert usage.fold() == 0
    assert usage.fold() == 0
    assert usage.report(()).total.requests == 2
    book.close()
    newer.close()


def test_sums_are_right_when_whoever_makes_them_is_killed_again_and_again(usage, tmp_path):
    """Two at a time fold, and die at random moments, while gateways write and end."""
    written = 0
    ended = threading.Event()

    def kill() -> None:
        chance = random.Random(4)
        while not ended.is_set():
            both = [
                subprocess.Popen(
                    [sys.executable, "-c", FOLD, str(tmp_path / "usage.db"), str(tmp_path / "journals")],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                for _ in range(2)
            ]
            for process in both:
                assert process.stdout is not None
                process.stdout.readline()
            ended.wait(chance.random() * 0.2)
            for process in both:
                process.kill()
                process.communicate()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        limit = time.monotonic() + 5
        while time.monotonic() < limit:
            book = Journal(tmp_path / "journals")
            for _ in range(3000):
                book.put(outcome(written))
                written += 1
            book.close()
    finally:
        ended.set()
        killer.join()
    usage.fold()
    total = usage.report(()).total
    assert (total.requests, total.prompt_tokens, total.cost) == (written, written * 10, pytest.approx(written * 25e-6))
    assert files(tmp_path / "journals") == []


def test_sums_match_what_clients_saw_when_daemon_and_gateway_are_killed(running, tmp_path):
    """Real requests to a real model, by several clients, across kills of both."""
    house = running
    status, _ = house.chat()
    assert status == 200
    seen, broken = [1], [0]
    counting, answered = threading.Lock(), threading.Semaphore(0)
    stop = threading.Event()

    def count(box: list[int]) -> None:
        with counting:
            box[0] += 1

    def client() -> None:
        while not stop.is_set():
            try:
                status, body = house.chat(tokens=1)
            except (OSError, http.client.HTTPException, ValueError):
                count(broken)
                stop.wait(0.05)  # the gateway comes back
                continue
            if status == 200 and body["usage"]["completion_tokens"] == 1:
                count(seen)
                answered.release()
            else:
                count(broken)

    clients = [threading.Thread(target=client) for _ in range(3)]
    for thread in clients:
        thread.start()
    try:
        for turn in range(4):
            for _ in range(15):
                assert answered.acquire(timeout=30), "no client had an answer for half a minute"
            if turn % 2:
                house.kill()
                house.start()
            else:
                os.kill(house.client.get("/status")["gateway"]["pid"], signal.SIGKILL)
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    report = house.client.get("/usage", by="model,operation")
    row = report["total"]
    good = row["requests"] - row["errors"]
    assert seen[0] <= good <= seen[0] + broken[0]
    assert row["completion_tokens"] >= seen[0]
    assert [r["operation"] for r in report["rows"] if r["model"] == "smollm2"] == ["chat"]


def test_usage_is_printed_as_a_table_as_json_and_for_spreadsheets(house, tmp_path):
    def pier(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pierhead.cli.main", "usage", *args]
        return subprocess.run(command, env=house.env, capture_output=True, text=True, timeout=30, check=False)

    assert "Nobody has used anything yet." in pier().stderr
    assert "Nothing fits" in pier("--model", "none").stderr
    folder = house.paths.state / "gateway" / "usage"
    folder.parent.mkdir()
    book = Journal(folder)
    for number in range(3):
        book.put(outcome(number, key="key_a" if number else "", model="=cmd()"))
    table = pier().stdout.splitlines()
    assert table[0].split() == ["KEY", "MODEL", "REQUESTS", "ERRORS", "PROMPT", "CACHED", "OUTPUT", "COST", "TIME"]
    assert table[-1].split()[:2] == ["all", "3"]
    assert json.loads(pier("--json", "--by", "").stdout)["total"]["requests"] == 3
    rows = list(csv.DictReader(io.StringIO(pier("--csv", "--by", "key,model").stdout)))
    assert [(r["key"], r["model"], r["requests"]) for r in rows] == [("", "'=cmd()", "1"), ("key_a", "'=cmd()", "2")]
    assert pier("--since", "never").returncode == 2
