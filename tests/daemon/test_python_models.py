"""Python models end to end: packaged, in an environment of their own, asked through the gateway in every dialect."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
from tests.conftest import CACHE

from .conftest import House

pytestmark = pytest.mark.timeout(180)
PIER = str(Path(sys.prefix) / "bin" / "pier")
MODEL = '''
# /// script
# dependencies = ["numpy>=2,<3"]
# ///
import os
import socket

import numpy as np
from pydantic import BaseModel


class Ask(BaseModel):
    x: list[float]


class Answer(BaseModel):
    y: float


class Mine:
    """Adds up."""

    max_batch_size = 4

    def load(self, folder):
        self.files = sorted(os.listdir(folder))

    def predict(self, asks: list[Ask]) -> list[Answer]:
        if any(a.x == [] for a in asks):
            raise ValueError("nothing to add")
        return [Answer(y=float(np.sum(a.x))) for a in asks]

    def chat(self, messages, max_tokens=100):
        said = messages[-1]["content"]
        if said == "reach out":
            with socket.create_connection(("198.51.100.1", 80), 2):
                yield "reached"
        if said == "end":
            print("about to end", flush=True)
            os._exit(3)
        if said == "write":
            open("/model/mine.py", "w")
        for word in said.split()[:max_tokens]:
            yield word.upper() + " "
'''


def pier(house: House, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([PIER, *args], env=house.env, capture_output=True, text=True, timeout=150)
    assert done.returncode == code, done.stderr
    return done


def ask(address: str, path: str, body: Any = None) -> tuple[int, Any]:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    try:
        connection.request("POST" if body is not None else "GET", path, json.dumps(body) if body is not None else None)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.fixture
def served(house: House, tmp_path: Path) -> tuple[House, str]:
    house.env["PIERHEAD_RUNTIME__ENVIRONMENTS"] = os.environ.get(
        "PIERHEAD_RUNTIME__ENVIRONMENTS", str(CACHE / "engines")
    )
    (tmp_path / "mine.py").write_text(MODEL)
    pier(house, "package", str(tmp_path / "mine.py"), "mine")
    said = house.start()
    assert "error" not in said, said
    return house, said["listeners"][0]


def test_a_program_that_ends_leaves_its_last_words_in_the_log(served: tuple[House, str]) -> None:
    house, address = served
    status, broken = ask(
        address, "/v1/chat/completions", {"model": "mine", "messages": [{"role": "user", "content": "end"}]}
    )
    assert (status, broken["error"]["code"]) == (502, "engine_failed")
    assert broken["error"]["hint"] == "`pier logs mine` may show why."
    for _ in range(100):  # what comes in the moment of the end may still reach the socket of the one that ends
        list(house.client.events("POST", "/replicas", {"model": "mine"}))
        if ask(address, "/v1/predict", {"model": "mine", "x": [1]})[0] == 200:
            break
    log = pier(house, "logs", "mine").stdout.splitlines()
    at = next(n for n, line in enumerate(log) if "ended with status 3" in line)
    assert "about to end" in log[:at]
    assert "about to end" in pier(house, "logs", "mine", "--tail", "50").stdout
    assert "about to end" not in pier(house, "logs", "mine", "--tail", "0").stdout


def test_a_class_answers_through_the_gateway_in_every_dialect(served: tuple[House, str]) -> None:
    house, address = served
    assert ask(address, "/v1/predict", {"model": "mine", "x": [1, 2.5]}) == (200, {"y": 3.5})
    status, wrong = ask(address, "/v1/predict", {"model": "mine", "x": "many"})
    assert (status, wrong["error"]["message"]) == (422, "x: Input should be a valid list")
    for _ in range(8):  # a model's own errors do not make the gateway give the replica up
        status, failed = ask(address, "/v1/predict", {"model": "mine", "x": []})
        assert (status, failed["error"]["message"]) == (500, "the model failed: ValueError: nothing to add")
    assert ask(address, "/v1/predict", {"model": "mine", "x": [1]})[0] == 200
    assert "nothing to add" in pier(house, "logs", "mine").stdout
    able = {card["id"]: card["capabilities"] for card in ask(address, "/v1/models")[1]["data"]}
    assert able["mine"] == ["chat", "predict"]
    dialects(address)
    document = ask(address, "/v1/models/mine/openapi.json")[1]
    asked = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert (asked["required"], asked["properties"]["model"]["const"]) == (["model", "x"], "mine")
    card = ask(address, "/v1/models/mine")[1]
    assert card["openapi"] == "/v1/models/mine/openapi.json"
    (mine,) = [replica for replica in house.client.get("/replicas") if replica["model"] == "mine"]
    assert (mine["engine"], mine["parallel"]) == ("python", 0)


def dialects(address: str) -> None:
    base = f"http://{address}"
    messages: Any = [{"role": "user", "content": "one two three"}]
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(model="mine", messages=messages)
        assert whole.choices[0].message.content == "ONE TWO THREE "
        pieces = client.chat.completions.create(model="mine", messages=messages, stream=True)
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == "ONE TWO THREE "
        assert client.responses.create(model="mine", input="hi there").output_text == "HI THERE "
    with anthropic.Anthropic(base_url=base, api_key="none", max_retries=0) as claude:
        said: Any = claude.messages.create(model="mine", max_tokens=2, messages=messages)
        assert said.content[0].text == "ONE TWO "
    with ollama.Client(base) as llama:
        assert llama.chat("mine", messages).message.content == "ONE TWO THREE "


def test_its_code_has_no_network_and_cannot_change_its_files(served: tuple[House, str]) -> None:
    _, address = served
    for said, error in (("reach out", "Error"), ("write", "Read-only file system")):
        body = {"model": "mine", "messages": [{"role": "user", "content": said}]}
        status, answer = ask(address, "/v1/chat/completions", body)
        assert status == 500
        assert error in answer["error"]["message"]


def test_a_model_that_cannot_load_gives_its_own_reason(served: tuple[House, str], tmp_path: Path) -> None:
    house, address = served
    (tmp_path / "bad.py").write_text(
        "class Bad:\n    def load(self, folder):\n        raise RuntimeError('no weights')\n    def predict(self): ..."
    )
    pier(house, "package", str(tmp_path / "bad.py"), "bad")
    status, answer = ask(address, "/v1/predict", {"model": "bad"})
    assert status >= 500
    assert "RuntimeError: no weights (bad.py, line 3)" in answer["error"]["message"]
    assert "Traceback" not in json.dumps(answer)


def test_the_example_runs_straight_from_its_folder(house: House) -> None:
    house.env["PIERHEAD_RUNTIME__ENVIRONMENTS"] = os.environ.get(
        "PIERHEAD_RUNTIME__ENVIRONMENTS", str(CACHE / "engines")
    )
    said = house.start()
    folder = str(Path(__file__).parents[2] / "examples" / "python-model")
    talked = pier(house, "run", folder, "Wo ist der Hafen, und was gibt es dort zu sehen?")
    assert talked.stdout.startswith("That is German, ")
    status, found = ask(said["listeners"][0], "/v1/predict", {"model": "python-model", "text": "Where is the water?"})
    assert (status, found["language"]) == (200, "English")
    status, found = ask(said["listeners"][0], "/v1/classify", {"model": "python-model", "input": ["Il n'y a rien."]})
    assert found["data"][0]["label"] == "French"


def test_generators_stream_to_clients_and_curls_way_of_sending_json_is_understood(house: House, tmp_path: Path) -> None:
    house.env["PIERHEAD_RUNTIME__ENVIRONMENTS"] = os.environ.get(
        "PIERHEAD_RUNTIME__ENVIRONMENTS", str(CACHE / "engines")
    )
    (tmp_path / "count.py").write_text(
        "class Count:\n"
        "    def load(self): ...\n"
        "    async def predict(self, n: int):\n"
        "        for at in range(n):\n"
        "            yield {'at': at}\n"
        "        if n > 3:\n"
        "            raise ValueError('too far')\n"
    )
    pier(house, "package", str(tmp_path / "count.py"), "count")
    host, _, port = house.start()["listeners"][0].rpartition(":")
    kinds = ("application/json", "application/x-www-form-urlencoded")
    for kind, n, end in ((kinds[0], 2, "[DONE]"), (kinds[1], 2, "[DONE]"), (kinds[0], 4, "too far")):
        connection = http.client.HTTPConnection(host, int(port), timeout=120)
        connection.request("POST", "/v1/predict", json.dumps({"model": "count", "n": n}), {"Content-Type": kind})
        response = connection.getresponse()
        said = [line for line in response.read().decode().split("\n\n") if line]
        connection.close()
        assert (response.status, response.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
        assert [json.loads(line[6:]) for line in said[:n]] == [{"at": at} for at in range(n)]
        assert end in said[n]
    whole = ask(f"{host}:{port}", "/v1/predict", {"model": "count", "n": 2, "stream": False})
    assert whole == (200, [{"at": 0}, {"at": 1}])


def test_json_is_asked_of_a_file_on_this_machine(house: House, tmp_path: Path) -> None:
    house.env["PIERHEAD_RUNTIME__ENVIRONMENTS"] = os.environ.get(
        "PIERHEAD_RUNTIME__ENVIRONMENTS", str(CACHE / "engines")
    )
    house.start()
    file = tmp_path / "count.py"
    file.write_text("class Count:\n    def load(self): ...\n    def predict(self, n: int): return {'twice': n * 2}\n")
    assert json.loads(pier(house, "run", str(file), '{"n": 4}').stdout) == {"twice": 8}
    file.write_text(file.read_text().replace("return {'twice': n * 2}", "yield from range(n)"))
    assert pier(house, "run", str(file), '{"n": 2}').stdout.split() == ["0", "1"]
    assert "n: Field required" in pier(house, "run", str(file), "{}", code=2).stderr
    assert "takes a JSON object" in pier(house, "run", "count", "hello", code=2).stderr
