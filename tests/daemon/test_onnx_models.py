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
    for name, make in (("mood", models.classifier), ("vectors", models.embedder), ("twice", models.doubler)):
        pier(house, "package", str(make(tmp_path / name)), name)
    said = house.start()
    assert "error" not in said, said
    return house, said["listeners"][0]


def pier(house: House, *args: str) -> str:
    done = subprocess.run([PIER, *args], env=house.env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_a_packaged_folder_is_served_by_its_first_request(served: tuple[House, str]) -> None:
    house, address = served
    answer = ask(address, "/v1/classify", {"model": "mood", "input": ["a good film", "bad"]})
    assert [one["label"] for one in answer["data"]] == ["POSITIVE", "NEGATIVE"]
    assert answer["model"] == "mood"
    able = {card["id"]: card["capabilities"] for card in ask(address, "/v1/models")["data"] if card["id"] != "smollm2"}
    assert able == {
        "mood": ["classify", "infer", "predict"],
        "vectors": ["embeddings", "infer", "predict"],
        "twice": ["infer", "predict"],
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


def tritons(address: str) -> None:
    """The field's own client, with tensors in JSON and in binary form."""
    client = triton.InferenceServerClient(address)
    try:
        assert client.is_model_ready("twice")
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
