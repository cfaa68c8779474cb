"""The times of an answer, against a gateway whose clock the test moves."""

from __future__ import annotations

import socketserver
import threading
from pathlib import Path

import pytest

from pierhead.cli.answer import Answer, receive
from pierhead.cli.chatapi import Stream
from pierhead.paths import resolve

EVENTS = b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


def test_the_times_of_an_answer_count_from_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    class Slow(socketserver.StreamRequestHandler):
        """Holds the headers back until it has something to say, as the gateway does."""

        def handle(self) -> None:
            size = 0
            while line := self.rfile.readline().strip():
                if line.lower().startswith(b"content-length:"):
                    size = int(line.partition(b":")[2])
            self.rfile.read(size)  # who hangs up before the question is whole breaks its asker
            now[0] += 2
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENTS)

    paths = resolve({"PIERHEAD_HOME": str(tmp_path)})
    paths.gateway_socket.parent.mkdir(parents=True, exist_ok=True)
    with socketserver.UnixStreamServer(str(paths.gateway_socket), Slow) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        answer = Answer()
        receive(Stream(paths, {"model": "m"}), answer, quiet=True)
        thread.join(10)
    assert answer.text == "Hi"
    assert answer.timings == {"first_token_s": 2.0, "total_s": 2.0}
