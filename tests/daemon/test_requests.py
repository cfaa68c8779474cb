"""Recorded requests as a person sees them, and sent again to a real model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from pierhead.gateway.telemetry import answers
from pierhead.gateway.telemetry.records import Record, Records

Pier = Callable[..., subprocess.CompletedProcess[str]]


def record(name: str, **more: Any) -> Record:
    given: dict[str, Any] = {
        "id": name, "time": time.time(), "key": "", "operation": "chat", "dialect": "openai",
        "path": "/v1/chat/completions", "asked": "smollm2", "model": "smollm2", "status": 200, "ok": True,
        "stream": False, "request": {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}]},
        "text": "Hello \x1b[31mthere", "seconds": 0.5,
    }  # fmt: skip
    return Record(**(given | more))


@pytest.fixture
def pier(house) -> Pier:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pierhead.cli.main", *args]
        return subprocess.run(command, env=house.env, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.fixture
def stored(house) -> Records:
    folder = house.paths.state / "gateway" / "records"
    folder.parent.mkdir(exist_ok=True)
    store = Records(folder)
    store.add(
        [
            record("req_old", time=time.time() - 10 * 86400),
            record("req_bad", status=502, ok=False, code="engine_failed", model="other"),
            record("req_image", media=True),
            record("req_new"),
        ]
    )
    return store


def test_requests_are_listed_shown_exported_and_removed(pier, stored, tmp_path):
    table = pier("requests", "list").stdout.splitlines()
    assert [line.split()[0] for line in table] == ["ID", "req_new", "req_image", "req_bad", "req_old"]
    assert "engine_failed" in table[3]
    listed = json.loads(pier("requests", "list", "--failed", "--json").stdout)
    assert [r["id"] for r in listed] == ["req_bad"]
    assert "request" not in listed[0]
    shown = pier("requests", "show", "req_ne").stdout
    assert '"content": "hi"' in shown
    assert "Hello [31mthere" in shown
    assert pier("requests", "show", "req_").returncode == 2
    assert pier("requests", "show", "nothing").returncode == 4 or pier("requests", "show", "nothing").returncode != 0
    file = tmp_path / "out.ndjson"
    assert pier("requests", "export", "--since", "1d", "-o", str(file)).returncode == 0
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["req_new", "req_image", "req_bad"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert pier("requests", "rm").returncode == 2
    assert json.loads(pier("requests", "rm", "--before", "7d", "--json").stdout) == {"removed": 1}
    assert json.loads(pier("requests", "rm", "req_new", "--json").stdout) == {"removed": 1}
    assert json.loads(pier("requests", "rm", "--all", "--json").stdout) == {"removed": 2}
    assert "Nothing is recorded" in pier("requests", "list").stderr
    assert pier("requests", "list", "--since", "soon").returncode == 2


def test_what_was_recorded_is_sent_again_and_compared(house, pier, tmp_path):
    said = house.start(PIERHEAD_GATEWAY__RECORD="all")
    assert "error" not in said, said
    for tokens in (4, 6):
        assert house.chat(tokens=tokens)[0] == 200
    assert house.chat(tokens=3, stream_options={"include_usage": True}, stop=["zzz"])[0] == 200
    connection, response = house.ask(tokens=5, stream=True)
    response.read()
    connection.close()
    deadline = time.monotonic() + 20
    while len(json.loads(pier("requests", "list", "--json").stdout)) < 4:
        assert time.monotonic() < deadline, "the recordings were not written"
    done = json.loads(pier("replay", "--last", "4", "--to", "smollm2", "--concurrency", "2", "--json").stdout)
    assert done["summary"]["requests"] == 4
    assert done["summary"]["failed"] == 0
    assert done["summary"]["same"] == 4, done["results"]  # the model is the same, and its temperature is 0
    for result in done["results"]:
        assert result["before"]["completion_tokens"] == result["after"]["completion_tokens"] > 0
    assert {bool(r["after"]["ttft"]) for r in done["results"]} == {True, False}
    file = tmp_path / "some.ndjson"
    everything: list[dict[str, Any]] = []
    while len(everything) < 8:
        assert time.monotonic() < deadline + 60, "the replays were not recorded"
        everything = json.loads(pier("requests", "list", "--json").stdout)
    first = {r["id"] for r in everything if not r["replay_of"]}
    again = {r["id"]: r["replay_of"] for r in everything if r["replay_of"]}
    assert sorted(again.values()) == sorted(first)
    one = next(iter(again))
    assert re.search(rf"^{one} .*chat, replay", pier("requests", "list").stdout, re.M)
    assert f"Replay of  {again[one]}" in pier("requests", "show", one).stdout
    repeated = json.loads(pier("replay", "--last", "8", "--to", "smollm2", "--json").stdout)
    assert {r["id"] for r in repeated["results"]} == first, "a replay is not replayed"
    assert repeated["left_out"] == 4
    assert pier("replay", one, "--to", "smollm2").returncode == 0, "unless it is asked for"
    pier("requests", "export", "--model", "smollm2", "-o", str(file))
    table = pier("replay", str(file), "--to", "smollm2:latest-that-is-not", "--diff")
    assert "404" in table.stdout
    assert "4 failed" in table.stderr
    assert "pier pull smollm2:latest-that-is-not" in " ".join(table.stderr.split()), "why they failed"
    assert "1 of" in table.stderr
    assert pier("replay", "--to", "smollm2").returncode == 2


def test_what_was_not_kept_whole_is_left_out(pier, stored):
    done = pier("replay", "req_image", "--to", "smollm2")
    assert done.returncode == 2
    assert "nothing to send again" in done.stderr


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        ("application/json", {"choices": [{"index": 0, "message": {"content": "a b"}}]}, "a b"),
        ("application/json", {"choices": [{"index": 0, "text": "a b"}]}, "a b"),
        ("application/json", {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a\nb"),
        ("application/json", {"message": {"role": "assistant", "content": "a b"}, "done": True}, "a b"),
        ("application/json", {"response": "a b", "done": True}, "a b"),
        ("application/json", {"output": [{"type": "message", "content": [{"text": "a b"}]}]}, "a b"),
        ("application/json", {"data": [{"embedding": [0.1]}]}, ""),
        ("text/event-stream", [{"choices": [{"delta": {"content": "a "}}]},
                               {"choices": [{"delta": {"content": "b"}}]}], "a b"),
        ("text/event-stream", [{"type": "content_block_delta", "index": 0,
                                "delta": {"type": "text_delta", "text": "a b"}}], "a b"),
        ("text/event-stream", [{"type": "response.output_text.delta", "delta": "a "},
                               {"type": "response.output_text.delta", "delta": "b"}], "a b"),
        ("application/x-ndjson", [{"message": {"content": "a "}}, {"message": {"content": "b"}, "done": True}], "a b"),
        ("application/x-ndjson", [{"response": "a "}, {"response": "b"}], "a b"),
    ],
)  # fmt: skip
def test_the_text_of_an_answer_is_found_in_every_dialect(kind, body, text):
    prefix = "data: " if kind == "text/event-stream" else ""
    raw = json.dumps(body) if isinstance(body, dict) else "\n\n".join(prefix + json.dumps(item) for item in body)
    assert answers.text(answers.Answer(200, kind, raw.encode(), True)) == text


def test_tool_calls_are_compared_too():
    pieces = [
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}}]},
    ]
    raw = "\n\n".join("data: " + json.dumps(piece) for piece in pieces).encode()
    assert answers.text(answers.Answer(200, "text/event-stream", raw, True)) == 'f{"a":1}'


def test_an_answer_that_is_cut_off_is_read_as_far_as_it_goes():
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    event = b'data: {"choices":[{"delta":{"content":"a b"}}]}\n\n'
    cut = answers.parse(head + b"%x\r\n%b\r\n5\r\nda" % (len(event), event))
    assert (answers.text(cut), cut.whole) == ("a b", False)
    assert answers.parse(b"nonsense") == answers.Answer(0, "", b"", False)
