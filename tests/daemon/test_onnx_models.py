"""ONNX models end to end: packaged, started on first use, asked through the gateway by the clients of the field."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import openai
import pytest
import tritonclient.http as triton
from tests.conftest import CACHE
from tests.engines.onnx import models

from .conftest import House

pytestmark = pytest.mark.timeout(180)
PIER = str(Path(sys.prefix) / "bin" / "pier")


@pytest.fixture
def served(house: House, tmp_path: Path) -> tuple[House, str]:
    """A daemon with ONNX models in its store, and the gateway's address."""
    house.env["PIERHEAD_RUNTIME__ENVIRONMENTS"] = os.environ.get(
        "PIERHEAD_RUNTIME__ENVIRONMENTS", str(CACHE / "engines")
    )
    makers = {"mood": models.classifier, "vectors": models.embedder, "twice": models.doubler, "order": models.ranker}
    for name, make in makers.items():
        pier(house, "package", str(make(tmp_path / name)), name)
    said = house.start()
    assert "error" not in said, said
    return house, said["listeners"][0]


def pier(house: House, *args: str, stdin: str = "", fails: bool = False) -> str:
    """What the command prints; of one that fails, what it complains of."""
    done = subprocess.run([PIER, *args], env=house.env, input=stdin, capture_output=True, text=True, timeout=150)
    assert (done.returncode != 0) is fails, done.stderr
    return done.stderr if fails else done.stdout


def ask(address: str, path: str, body: Any = None) -> Any:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    try:
        connection.request("POST" if body is not None else "GET", path, json.dumps(body) if body is not None else None)
        response = connection.getresponse()
        data = response.read()
        assert response.status == 200, data
        return json.loads(data)
    finally:
        connection.close()


def test_packaged_models_are_served_by_their_first_request_to_people_and_programs(
    served: tuple[House, str], tmp_path: Path
) -> None:
    house, address = served
    answer = ask(address, "/v1/classify", {"model": "mood", "input": ["a good film", "bad"]})
    assert [one["label"] for one in answer["data"]] == ["POSITIVE", "NEGATIVE"]
    assert answer["model"] == "mood"
    able = {card["id"]: card["capabilities"] for card in ask(address, "/v1/models")["data"] if card["id"] != "smollm2"}
    assert able == {
        "mood": ["classify", "infer", "predict"],
        "vectors": ["embeddings", "infer", "predict"],
        "twice": ["infer", "predict"],
        "order": ["rerank", "infer", "predict"],
    }

    client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
    vector = client.embeddings.create(model="vectors", input="a b").data[0].embedding
    assert vector == pytest.approx([0.70710678, 0.70710678, 0])
    assert ask(address, "/api/embed", {"model": "vectors", "input": "c"})["embeddings"] == [[0, 0, 1]]
    assert ask(address, "/v1/predict", {"model": "twice", "inputs": [[1, 2, 3, 4]]})["outputs"]["total"] == [10]

    tritons(address)
    (mood,) = [replica for replica in house.client.get("/replicas") if replica["model"] == "mood"]
    assert mood["engine"] == "onnx"
    assert mood["parallel"] == 0, "the engine makes batches itself: the gateway must not hold requests back"
    person(house)
    wrong(house, tmp_path)


def tritons(address: str) -> None:
    """The field's own client, with tensors in JSON and in binary form."""
    client = triton.InferenceServerClient(address)
    try:
        assert client.is_model_ready("twice")
        told = client.get_model_metadata("twice")
        assert told["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
        assert [one["name"] for one in told["outputs"]] == ["y", "total"]
        assert client.get_model_metadata("mood")["inputs"][0]["name"] == "text_input"
        for binary in (True, False):
            given = triton.InferInput("x", [2, 4], "FP32")
            given.set_data_from_numpy(numpy.ones((2, 4), numpy.float32), binary_data=binary)
            wanted = triton.InferRequestedOutput("y", binary_data=binary)
            found = client.infer("twice", [given], outputs=[wanted])
            assert found.as_numpy("y").tolist() == [[2, 2, 2, 2]] * 2
        text = triton.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(numpy.array(["good"], object))
        assert client.infer("mood", [text]).as_numpy("label").tolist() == [b"POSITIVE"]
    finally:
        client.close()


def person(house: House) -> None:
    """What the command prints of models that do not chat."""
    assert pier(house, "run", "mood", "a good film").split() == ["POSITIVE", "0.9820"]
    told = json.loads(pier(house, "run", "mood", "bad", "--json"))
    assert (told["label"], told["model"]) == ("NEGATIVE", "mood")
    assert told["score"] == max(told["probs"])
    assert json.loads(pier(house, "run", "vectors", "c")) == [0, 0, 1]
    assert json.loads(pier(house, "run", "twice", '{"x": [[1, 2, 3, 4]]}'))["total"] == [10]
    lines = pier(house, "run", "order", "film", stdin="bad film\n\ngood film\n").splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == ["TEXT", "good film", "bad film"]
    assert "one text per line" in pier(house, "run", "order", "film", fails=True)
    assert "the text is no JSON" in pier(house, "run", "twice", "hello", fails=True)
    assert "no input 'z'" in pier(house, "run", "twice", '{"z": 1}', fails=True)


def wrong(house: House, tmp_path: Path) -> None:
    """A model that cannot start says why in one line, a setting that is misspelt what is meant."""
    folder = models.classifier(tmp_path / "wrong")
    (folder / "tokenizer.json").write_text("{}")
    pier(house, "package", str(folder), "wrong")
    said = pier(house, "run", "wrong", "hello", fails=True)
    assert "engine: tokenizer.json cannot be used" in said
    assert "Traceback" not in said
    assert "Did you mean 'max_batch'?" in pier(house, "run", "mood", "a", "--option", "max-bach=3", fails=True)
