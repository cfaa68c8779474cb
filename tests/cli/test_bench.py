"""The verb bench as a person runs it: with the real model, and against another server."""

from __future__ import annotations

import http.server
import json
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pierhead.paths import Paths

from .conftest import Pier, environment

ONE = {"PIERHEAD_ENGINE__THREADS": "1"}
LITTLE = ("--requests", "2", "--prompt-tokens", "40", "--output-tokens", "4", "--warmup", "1")


class Rival(http.server.BaseHTTPRequestHandler):
    """Another server of OpenAI's API, which wants a key and has no list of models."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer sk-secret":
            return self.reply(401, {"error": {"message": "who are you?"}})
        words = len(asked["messages"][0]["content"].split())
        delta = {"choices": [{"delta": {"content": "a"}}]}
        usage = {"choices": [], "usage": {"prompt_tokens": words, "completion_tokens": 2}}
        events = "".join(f"data: {json.dumps(e)}\n\n" for e in (delta, delta, usage)) + "data: [DONE]\n\n"
        self.reply(200, events.encode(), "text/event-stream")

    def reply(self, status: int, value: Any, kind: str = "application/json") -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def rival() -> Iterator[str]:
    """The base URL of another server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rival)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.model
def test_a_real_model_is_measured_saved_drawn_and_compared(
    stocked: tuple[Pier, Paths, dict[str, str]], tmp_path: Path
) -> None:
    pier, _, _ = stocked
    kept, drawn = tmp_path / "a.json", tmp_path / "a.svg"
    loads = ("--concurrency", "1,2", "--rate", "4", "--rounds", "2")
    done = pier("bench", "smollm2", *LITTLE, *loads, "--json", "--save", str(kept), "--svg", str(drawn), **ONE)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads(kept.read_text())
    assert [row["load"] for row in report["results"]] == ["1 at once", "2 at once", "4/s"]
    for row in report["results"]:
        assert (row["requests"], row["failed"], row["prompt_tokens"], row["output_tokens"]) == (4, 0, 40, 4)
        assert row["figures"]["output_tps"] > 0
        assert 0 < row["figures"]["ttft_p50_ms"] <= row["figures"]["e2e_p99_ms"]
        assert row["figures"]["itl_p50_ms"] > 0
        assert len(row["rounds"]["rps"]) == 2
    ET.parse(drawn)

    same = pier("bench", "--compare", str(kept), str(kept))
    assert same.returncode == 0, same.stderr
    assert "within the noise" in same.stdout
    assert "+0.0%" in same.stdout


def test_another_server_is_measured_with_a_key_that_is_in_no_argument(bare: Pier, rival: str, tmp_path: Path) -> None:
    args = ("bench", "big-model", "--url", rival, *LITTLE, "--rounds", "1", "--concurrency", "1,3")
    done = bare(*args, "--key", "env:RIVAL_KEY", "--save", str(tmp_path / "r.json"), RIVAL_KEY="sk-secret")
    assert done.returncode == 0, done.stderr
    assert "3 at once" in done.stdout
    assert "Output tokens/s" in done.stdout
    assert "sk-secret" not in done.stdout + done.stderr + (tmp_path / "r.json").read_text()
    without = bare(*args)
    assert without.returncode == 2
    assert "wants a key: who are you?" in without.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("m", "--concurrency", "0"), "--concurrency: '0'"),
        (("m", "--concurrency", "1,two"), "--concurrency: 'two'"),
        (("m", "--rate", "nan"), "--rate: 'nan'"),
        (("m", "--url", "ftp://x"), "must begin with https://"),
        (("m", "--url", "http://127.0.0.1:1", "--key", "env:NOT_SET"), "--key names nothing"),
        (("m", "--url", "http://127.0.0.1:1"), "does not answer"),
        (("--compare", "none.json"), "cannot read none.json"),
        ((), "which model?"),
        (("m", "--url", "http://127.0.0.1:1", "--save", "none/a.json"), "there is no folder none"),
        (("m", "--url", "http://127.0.0.1:1", "--svg", "/"), "it is a folder"),
    ],
)
def test_what_cannot_be_measured_is_said(bare: Pier, args: tuple[str, ...], said: str) -> None:
    done = bare("bench", *args)
    assert done.returncode
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_a_test_at_once(rival: str, tmp_path: Path) -> None:
    env = environment(tmp_path / "home") | {"OPENAI_API_KEY": "sk-secret"}
    args = ("bench", "big-model", "--url", rival, "--duration", "600", "--concurrency", "2", "--warmup", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "pierhead.cli.main", *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    assert b"Warming up" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in said
