"""Engines that are commands of the settings file: real programs, in the sandbox, behind the gateway."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

import pytest
from tests.conftest import CACHE

from .conftest import House
from .test_python_models import ask, pier

pytestmark = pytest.mark.timeout(180)
# llama.cpp's own server, started by a script as somebody might have one.
LLAMA = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames = sys.argv[1], ["127.0.0.1"]
params.port, params.n_ctx = int(sys.argv[2]), int(sys.argv[3])
params.model_alias = {sys.argv[4]}
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
threading.Event().wait()
"""
PLAIN = """
import http.server, json, socket, socketserver, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def address_string(self): return "-"
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200); self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)
    def do_GET(self): self.answer({"up": True})
    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"greeting": sys.argv[2], "given": given["x"], "weights": open(sys.argv[3]).read()})
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer): daemon_threads = True
Server(sys.argv[1], Handler).serve_forever()
"""


@pytest.fixture
def started(house: House, tmp_path: Path) -> tuple[House, str]:
    house.env["PIERHEAD_RUNTIME__ENVIRONMENTS"] = os.environ.get(
        "PIERHEAD_RUNTIME__ENVIRONMENTS", str(CACHE / "engines")
    )
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "llama.py").write_text(LLAMA)
    (programs / "plain.py").write_text(PLAIN)
    house.paths.config.mkdir(parents=True, exist_ok=True)
    (house.paths.config / "config.toml").write_text(f"""
[engines.my-llama]
title = "llama.cpp by hand"
formats = ["gguf"]
serves = ["chat", "completions"]
command = ["$(PYTHON)", "{programs}/llama.py", "$(MODEL_DIR)/$(WEIGHTS)", "$(PORT)", "{{context}}", "$(NAME)"]
mounts = ["{programs}"]
requirements = ["xllamacpp=={importlib.metadata.version("xllamacpp")}"]
settings = {{ context = 512 }}

[engines.plain]
formats = ["numpy"]
serves = ["predict"]
command = ["{sys.executable}", "{programs}/plain.py", "$(SOCKET)", "{{greeting}}", "$(MODEL_DIR)/$(WEIGHTS)"]
mounts = ["{programs}", "{sys.prefix}", "{Path(sys.executable).resolve().parent.parent}"]
health = "/up"
settings = {{ greeting = "hello" }}

[engines.absent]
formats = ["keras"]
serves = ["predict"]
command = ["no-such-program", "$(PORT)"]
""")
    said = house.start()
    assert "error" not in said, said
    return house, said["listeners"][0]


def test_llama_cpp_started_by_a_command_answers_every_dialect(started: tuple[House, str]) -> None:
    house, address = started
    pier(house, "run", "smollm2", "Hi", "--engine", "my-llama", "--max-tokens", "4", "--option", "context=1024")
    (replica,) = house.client.get("/replicas")
    assert (replica["engine"], replica["runtime"], replica["context"]) == ("my-llama", "process", 1024)
    body = {"model": "smollm2", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
    assert ask(address, "/v1/chat/completions", body)[1]["usage"]["completion_tokens"] == 4
    assert ask(address, "/v1/messages", body)[1]["content"][0]["text"]
    refused = pier(house, "run", "smollm2", "Hi", "--engine", "my-llama", "--option", "contxt=5", code=2)
    assert "Did you mean 'context'?" in refused.stderr


def test_a_program_on_a_socket_is_served_and_its_settings_are_words(started: tuple[House, str], tmp_path: Path) -> None:
    house, address = started
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.npy").write_text("numbers")
    pier(house, "package", "--dir", str(tmp_path / "m"), "plain")
    answer = ask(address, "/v1/predict", {"model": "plain", "x": [1]})
    assert answer == (200, {"greeting": "hello", "given": [1], "weights": "numbers"})
    assert {c["id"]: c["capabilities"] for c in ask(address, "/v1/models")[1]["data"]}["plain"] == ["predict"]


def test_a_program_that_is_not_there_is_said_in_one_line(started: tuple[House, str], tmp_path: Path) -> None:
    house, address = started
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "a.keras").write_bytes(b"PK\x05\x06" + bytes(18))
    pier(house, "package", "--dir", str(tmp_path / "k"), "absent")
    status, answer = ask(address, "/v1/predict", {"model": "absent"})
    assert status >= 500
    assert "no-such-program cannot be started: No such file or directory" in json.dumps(answer)
