"""Light engines in real containers, end to end: Python models, ONNX models, and engines that are commands."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.daemon.test_python_models import ask
from tests.engines.onnx import models

from pierhead.errors import EngineFailed, RuntimeUnavailable

from .conftest import Installation, installed

pytestmark = [pytest.mark.timeout(600), pytest.mark.docker]
# A class that looks around in its container, with what `predict` can be.
MINE = '''
# /// script
# dependencies = ["numpy>=2,<3"]
# ///
import asyncio, os, pathlib, socket, subprocess, sys

import numpy as np
from pydantic import BaseModel


class Ask(BaseModel):
    x: list[float]


class Mine:
    """Adds up."""

    max_batch_size = 8
    batch_delay_ms = 20

    def load(self, folder):
        self.folder = folder
        self.largest = 0

    async def predict(self, asks: list[Ask]) -> list[dict]:
        self.largest = max(self.largest, len(asks))
        await asyncio.sleep(0)
        return [{"sum": float(np.sum(a.x)), "batch": len(asks)} for a in asks]

    def chat(self, messages):
        for word in messages[-1]["content"].split():
            yield word.upper() + " "

    def classify(self, texts):
        return [{"label": attempt(text, self.folder)} for text in texts]


def attempt(what, folder):
    try:
        if what == "user":
            return f"{os.getuid()} {os.getgroups()}"
        if what == "status":
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            return " ".join(line for line in lines if line.startswith(("CapEff", "CapBnd", "NoNewPrivs", "Seccomp:")))
        if what == "network":
            return " ".join(sorted(os.listdir("/sys/class/net")))
        if what == "reach":
            socket.create_connection(("198.51.100.1", 80), 2)
        if what == "child":
            return subprocess.check_output([sys.executable, "-c", "import numpy; print(numpy.__name__)"], text=True)
        if what.startswith("write "):
            open(what.removeprefix("write ").replace("MODEL", folder), "w").close()
        if what == "run from tmp":
            pathlib.Path("/tmp/program").write_text("#!/bin/sh\\n")
            os.chmod("/tmp/program", 0o755)
            subprocess.check_call(["/tmp/program"])
        return "done"
    except OSError as exc:
        return f"{type(exc).__name__}: {exc.strerror}"
'''
APP = """
import json, os, pathlib, sys

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    while scope["method"] == "POST":
        message = await receive()
        body += message["body"]
        if not message.get("more_body"):
            break
    weights = pathlib.Path(__file__).with_name("a.npy").read_text()
    told = {"asked": json.loads(body or "{}"), "weights": weights, "uid": os.getuid()}
    told["greeting"] = os.environ["GREETING"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(told).encode()})
"""
PLAIN = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200); self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)
    def do_GET(self): self.answer({"up": True})
    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"given": given["x"], "uid": os.getuid(), "image": os.path.exists("/opt/mine/serve.py")})
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def own_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Somebody's image with a server that knows nothing of Pierhead."""
    if not os.environ.get("PIERHEAD_TEST_DOCKER") or shutil.which("docker") is None:
        pytest.skip("no Docker Engine for tests (PIERHEAD_TEST_DOCKER) or no docker command")
    folder = tmp_path_factory.mktemp("image")
    (folder / "serve.py").write_text(PLAIN)
    (folder / "Dockerfile").write_text(
        f'FROM {os.environ["PIERHEAD_TEST_IMAGE"]}\nCOPY serve.py /opt/mine/\nENTRYPOINT ["sleep"]\n'
    )
    name = f"pierhead-test/own-server:{uuid.uuid4().hex[:8]}"
    docker("build", "--quiet", "--tag", name, str(folder))
    yield name
    docker("rmi", "-f", name)


def docker(*args: str) -> str:
    env = {**os.environ, "DOCKER_HOST": os.environ["PIERHEAD_TEST_DOCKER"], "DOCKER_BUILDKIT": "0"}
    done = subprocess.run(["docker", *args], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def host(stocked: Path, own_image: str) -> Iterator[Installation]:
    config = f"""
[engines.asgi]
title = "A wheel's own program"
formats = ["numpy"]
serves = ["predict"]
command = ["uvicorn", "--uds", "$(SOCKET)", "--app-dir", "$(MODEL_DIR)", "--log-level", "warning", "app:app"]
requirements = ["uvicorn==0.54.0"]
env = {{ GREETING = "{{greeting}}" }}
settings = {{ greeting = "hello" }}

[engines.module]
formats = ["numpy"]
serves = ["predict"]
command = ["$(PYTHON)", "-m", "uvicorn", "--port", "$(PORT)", "--app-dir", "$(MODEL_DIR)", "app:app"]
requirements = ["uvicorn==0.54.0"]
env = {{ GREETING = "hi" }}

[engines.own]
formats = ["numpy"]
serves = ["predict"]
command = ["python3", "/opt/mine/serve.py", "$(PORT)"]
image = "{own_image}"

[engines.here]
formats = ["numpy"]
serves = ["predict"]
command = ["/bin/false", "$(PORT)"]
"""
    with installed(stocked, config) as made:
        yield made


def classified(host: Installation, *texts: str) -> list[str]:
    status, answer = ask(host.address, "/v1/classify", {"model": "mine", "input": list(texts)})
    assert status == 200, answer
    return [one["label"] for one in answer["data"]]


@pytest.fixture(scope="module")
def mine(host: Installation, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(MINE)
    host.pier("package", str(file), "mine")
    assert host.start("mine", "docker").runtime == "docker"
    return host


def test_a_python_model_answers_from_its_container_in_batches_and_streams(mine: Installation) -> None:
    assert ask(mine.address, "/v1/predict", {"model": "mine", "x": [1, 2.5]})[1]["sum"] == 3.5
    status, wrong = ask(mine.address, "/v1/predict", {"model": "mine", "x": "many"})
    assert (status, wrong["error"]["message"]) == (422, "x: Input should be a valid list")
    with ThreadPoolExecutor(16) as pool:
        bodies = [{"model": "mine", "x": [n, 1]} for n in range(64)]
        found = list(pool.map(lambda body: ask(mine.address, "/v1/predict", body), bodies))
    assert [answer["sum"] for _, answer in found] == [n + 1 for n in range(64)]
    assert max(answer["batch"] for _, answer in found) > 1
    with mine.openai as client:
        pieces = client.chat.completions.create(
            model="mine", messages=[{"role": "user", "content": "one two"}], stream=True
        )
        assert [p.choices[0].delta.content for p in pieces if p.choices][:2] == ["ONE ", "TWO "]
    document = ask(mine.address, "/v1/models/mine/openapi.json")[1]
    assert sorted(document["paths"]) == ["/v1/chat/completions", "/v1/classify", "/v1/predict"]


def test_its_container_keeps_it_in(mine: Installation) -> None:
    user, status, network, child = classified(mine, "user", "status", "network", "child")
    assert user.split()[0] not in ("", "0")
    assert "0" not in user.partition("[")[2].strip("]").split(", ")
    assert status.split() == ["CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1", "Seccomp:", "2"]
    assert network.split() == ["lo"]
    assert child == "numpy\n", "programs that it starts have its packages"
    read_only = classified(
        mine, "write /x", "write /etc/passwd", "write MODEL/mine.py", "write /opt/engine/entry/app.py"
    )
    assert set(read_only) <= {"OSError: Read-only file system", "PermissionError: Permission denied"}
    assert classified(mine, "write /tmp/x", "run from tmp") == ["done", "PermissionError: Permission denied"]
    assert classified(mine, "reach")[0].startswith("OSError: Network is unreachable")
    (replica,) = [one for one in mine.house.client.get("/replicas") if one["model"] == "mine"]
    shown: Any = json.loads(docker("inspect", replica["container"]))[0]
    limits = shown["HostConfig"]
    assert limits["ReadonlyRootfs"]
    assert limits["NetworkMode"] == "none"
    assert limits["CapDrop"] == ["ALL"]
    assert limits["Memory"] == limits["MemorySwap"] > 0
    assert limits["PidsLimit"] > 0
    assert shown["Config"]["User"].split(":")[0] not in ("", "0", "root")


def test_a_class_that_cannot_load_in_a_container_gives_its_reason_in_one_line(
    host: Installation, tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text(
        "class Bad:\n    def load(self, folder):\n        raise RuntimeError('no weights')\n    def predict(self): ..."
    )
    host.pier("package", str(tmp_path / "bad.py"), "bad")
    with pytest.raises(EngineFailed, match=r"RuntimeError: no weights \(bad\.py, line 3\)") as failed:
        host.start("bad", "docker")
    assert "Traceback" not in failed.value.message


def test_onnx_models_answer_from_a_container(host: Installation, tmp_path: Path) -> None:
    for name, make in (("mood", models.classifier), ("vectors", models.embedder), ("twice", models.doubler)):
        host.pier("package", str(make(tmp_path / name)), name)
        assert host.start(name, "docker").runtime == "docker"
    answer = ask(host.address, "/v1/classify", {"model": "mood", "input": ["a good film", "bad"]})[1]
    assert [one["label"] for one in answer["data"]] == ["POSITIVE", "NEGATIVE"]
    assert host.pier("run", "mood", "a good film", "--runtime", "docker").split() == ["POSITIVE", "0.9820"]
    assert host.openai.embeddings.create(model="vectors", input="c").data[0].embedding == [0, 0, 1]
    asked = {"model": "twice", "inputs": [[1, 2, 3, 4]]}
    assert ask(host.address, "/v1/predict", asked)[1]["outputs"]["total"] == [10]
    images = [one["container"] for one in host.house.client.get("/replicas") if one["engine"] == "onnx"]
    assert len({docker("inspect", "-f", "{{.Image}}", one) for one in images}) == 1, "they share one image"
    host.stop("mood")
    host.stop("vectors")
    host.stop("twice")
    bad = models.classifier(tmp_path / "wrong")
    (bad / "tokenizer.json").write_text("{}")
    host.pier("package", str(bad), "wrong")
    with pytest.raises(EngineFailed, match=r"tokenizer\.json cannot be used"):
        host.start("wrong", "docker")


@pytest.fixture
def app(host: Installation, tmp_path: Path) -> Iterator[str]:
    """A model whose folder has a program and weights."""
    (tmp_path / "a.npy").write_text("numbers")
    (tmp_path / "app.py").write_text(APP)
    host.pier("package", "--dir", str(tmp_path), "app", "--allow-unsafe", "--option", "engine=asgi")
    yield "app"
    with contextlib.suppress(AssertionError):
        host.stop("app")


@pytest.mark.parametrize(("engine", "greeting"), [("asgi", "hello"), ("module", "hi")])
def test_programs_that_come_as_wheels_answer_from_a_container(
    host: Installation, app: str, engine: str, greeting: str
) -> None:
    assert host.start(app, "docker", engine=engine).runtime == "docker"
    answer = ask(host.address, "/v1/predict", {"model": app, "x": 1})[1]
    assert (answer["asked"]["x"], answer["weights"], answer["greeting"]) == (1, "numbers", greeting)
    assert answer["uid"] != 0


def test_an_image_of_ones_own_answers_behind_the_bridge_and_is_chosen_without_being_asked_for(
    host: Installation, app: str
) -> None:
    assert host.start(app, "auto", engine="own").runtime == "docker"
    answer = ask(host.address, "/v1/predict", {"model": app, "x": [1]})
    assert answer[1]["given"] == [1]
    assert answer[1]["image"]
    assert answer[1]["uid"] != 0


def test_a_program_of_this_machine_is_in_no_image_and_that_is_said(host: Installation, app: str) -> None:
    with pytest.raises(RuntimeUnavailable, match="the engine 'here' has no container image") as refused:
        host.start(app, "docker", engine="here")
    assert "--runtime process" in (refused.value.hint or "")
