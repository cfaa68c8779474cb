"""Plain tensors: JSON and the Open Inference Protocol; types kept, shapes checked, hostile ones refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest

from . import models
from .conftest import Serve, Served

pytestmark = pytest.mark.timeout(120)
INFER = "/v2/models/tiny/infer"


def tensor(**change: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]} | change]}


def test_named_lists_go_in_and_named_lists_come_out(doubler: Served) -> None:
    answer = doubler.ask("/v1/predict", {"model": "any", "inputs": {"x": [[1, 2, 3, 4.5]]}})
    assert answer == {"model": "tiny", "outputs": {"y": [[2, 4, 6, 9]], "total": [10.5]}}
    assert doubler.ask("/v1/predict", {"inputs": [[0, 0, 0, 1]]})["outputs"]["total"] == [1]


def test_the_protocol_takes_flat_and_nested_data_and_gives_the_outputs_that_are_asked_for(doubler: Served) -> None:
    answer = doubler.ask(INFER, tensor(data=[[1, 2, 3, 4]]) | {"id": "7", "outputs": [{"name": "total"}]})
    assert answer["outputs"] == [{"name": "total", "datatype": "FP32", "shape": [1], "data": [10]}]
    assert (answer["id"], answer["model_name"]) == ("7", "tiny")
    assert {one["name"] for one in doubler.ask(INFER, tensor())["outputs"]} == {"y", "total"}


def test_binary_tensors_follow_the_json_both_ways(doubler: Served) -> None:
    raw = numpy.array([[1, 2, 3, 4]], "<f4").tobytes()
    told = tensor(parameters={"binary_data_size": len(raw)}) | {"parameters": {"binary_data_output": True}}
    del told["inputs"][0]["data"]
    head = json.dumps(told).encode()
    response = doubler.post(INFER, head + raw, **{"inference-header-content-length": str(len(head))})
    cut = int(response.headers["inference-header-content-length"])
    outputs = json.loads(response.content[:cut])["outputs"]
    assert [one["parameters"]["binary_data_size"] for one in outputs] == [16, 4]
    assert numpy.frombuffer(response.content[cut:], "<f4").tolist() == [2, 4, 6, 8, 10]


def test_the_models_metadata_names_its_tensors(doubler: Served, classifier: Served) -> None:
    told = doubler.client.get("/v2/models/tiny").json()
    assert told["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert {one["name"] for one in classifier.client.get("/v2/models/tiny").json()["inputs"]} == {"text_input"}
    for path in ("/v2", "/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny/versions/1"):
        assert doubler.client.get(path).status_code == 200


def test_a_model_of_texts_takes_texts_or_its_own_tensors(classifier: Served) -> None:
    texts = {"inputs": [{"name": "text_input", "shape": [2], "datatype": "BYTES", "data": ["good", "bad"]}]}
    found = {one["name"]: one["data"] for one in classifier.ask(INFER, texts)["outputs"]}
    assert found["label"] == ["POSITIVE", "NEGATIVE"]
    assert len(found["probabilities"]) == 4
    raw = [
        {"name": name, "shape": [1, 3], "datatype": "INT64", "data": data}
        for name, data in (("input_ids", [2, 4, 3]), ("attention_mask", [1, 1, 1]))
    ]
    assert classifier.ask(INFER, {"inputs": raw})["outputs"][0]["data"] == [-2, 2]


def test_every_type_goes_through_unchanged(starts: Serve, shelf: Path) -> None:
    served = starts(models.mixed(shelf / "mixed")).wait()
    given = {
        "i": ("INT32", [2], [-(2**31), 7]),
        "h": ("FP16", [1], [0.5]),
        "t": ("BYTES", [2], ["é", ""]),
        "f": ("BOOL", [2], [True, False]),
        "s": ("INT64", [], [2**40]),
    }
    inputs = [{"name": n, "shape": s, "datatype": d, "data": v} for n, (d, s, v) in given.items()]
    outputs = {one["name"]: one for one in served.ask(INFER, {"inputs": inputs})["outputs"]}
    for name, (datatype, shape, data) in given.items():
        found = outputs[f"{name}_out"]
        assert (found["datatype"], found["shape"], found["data"]) == (datatype, shape, data)
    plain = {"i": [1, 2], "h": [1.5], "t": ["x", "y"], "f": [True, True], "s": 3}
    assert served.ask("/v1/predict", {"inputs": plain})["outputs"]["s_out"] == 3
    for name, wrong in (("i", [2**31]), ("i", [1.5]), ("t", [1]), ("f", [1]), ("i", [[1], [1, 2]]), ("i", ["1"])):
        assert f"'{name}'" in served.refused("/v1/predict", {"inputs": plain | {name: wrong}})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shape": [1, 5]}, "4 elements"),
        ({"shape": [4]}, "the model wants [-1, 4]"),
        ({"shape": [2, 2]}, "the model wants [-1, 4]"),
        ({"shape": [-1, 4]}, "its shape is"),
        ({"shape": [1 << 40, 1 << 40]}, "its shape is"),
        ({"shape": [1] * 40}, "dimensions"),
        ({"datatype": "FP64"}, "not FP32"),
        ({"datatype": "COMPLEX"}, "its datatype"),
        ({"data": ["a", "b", "c", "d"]}, "cannot be used"),
        ({"data": [1, 2, 3]}, "3 elements"),
        ({"data": None}, "no data"),
        ({"data": {"a": 1}}, "cannot be used"),
        ({"name": "z"}, "no input 'z'"),
        ({"parameters": {"binary_data_size": 999}}, "bytes are left"),
        ({"parameters": {"binary_data_size": -1}}, "bytes are left"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_tensor_that_does_not_fit_is_told_why(doubler: Served, change: dict[str, Any], why: str) -> None:
    assert why in doubler.refused(INFER, tensor(**change))


def test_bytes_that_lie_about_their_lengths_are_refused(classifier: Served, doubler: Served) -> None:
    for data, why in (
        (struct.pack("<I", 5) + b"ab", "longer than the tensor"),
        (struct.pack("<I", 2) + b"\xff\xfe", "not UTF-8"),
        (b"\x01", "longer than the tensor"),
        (b"", "does not have 1 elements"),
        (struct.pack("<I", 0) * 3, "does not have 1 elements"),
    ):
        one = {"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
        head = json.dumps({"inputs": [one]}).encode()
        length = {"inference-header-content-length": str(len(head))}
        assert why in classifier.refused(INFER, head + data, **length)
    head = json.dumps(tensor()).encode()
    length = {"inference-header-content-length": str(len(head))}
    assert "bytes follow" in doubler.refused(INFER, head + b"x", **length)
    for lie in ("-1", "9" * 30, "x", "99999"):
        assert "the body has" in doubler.refused(INFER, tensor(), **{"inference-header-content-length": lie})


def test_one_request_that_the_model_cannot_work_on_does_not_spoil_others(classifier: Served) -> None:
    """Token 999 is beyond the table: ONNX Runtime fails on the whole batch that it is in."""

    def raw(token: int) -> dict[str, Any]:
        ids = {"name": "input_ids", "shape": [1, 1], "datatype": "INT64", "data": [token]}
        return {"inputs": [ids, ids | {"name": "attention_mask", "data": [1]}]}

    assert "the model cannot work with this input" in classifier.refused(INFER, raw(999))
    assert classifier.ask(INFER, raw(4))["outputs"][0]["data"] == [-2, 2]
    assert classifier.ask("/v1/classify", {"input": "good"})["data"][0]["label"] == "POSITIVE"


def test_unknown_outputs_and_missing_inputs_are_named(doubler: Served, classifier: Served) -> None:
    assert "no output 'z'" in doubler.refused(INFER, tensor() | {"outputs": [{"name": "z"}]})
    assert "is missing" in doubler.refused(INFER, {"inputs": []})
    assert "twice" in doubler.refused(INFER, {"inputs": tensor()["inputs"] * 2})
    assert "must be an object" in classifier.refused("/v1/predict", {"inputs": [[1]]})


def binary(rows: int, length: int) -> tuple[bytes, dict[str, str]]:
    """Tokens for a classifier as tensors: in each row one ``good``."""
    ids = numpy.zeros((rows, length), "<i8")
    ids[:, 0] = models.WORDS.index("good")
    inputs = [
        {"name": n, "shape": [rows, length], "datatype": "INT64", "parameters": {"binary_data_size": ids.nbytes}}
        for n in models.TEXTS
    ]
    head = json.dumps({"inputs": inputs, "outputs": [{"name": "logits"}]}).encode()
    return head + ids.tobytes() + (ids > 0).astype("<i8").tobytes(), {"inference-header-content-length": str(len(head))}


def test_a_request_of_many_rows_is_as_many_runs_as_the_models_memory_was_reckoned_for(
    starts: Serve, shelf: Path
) -> None:
    served = starts(models.classifier(shelf / "many"), max_batch=8, max_batch_tokens=100).wait()
    runs = served.counted("onnx_batch_size_count")
    body, length = binary(100, 50)
    response = served.post(INFER, body, **length)
    assert response.json()["outputs"][0]["data"] == [-2, 2] * 100
    assert served.counted("onnx_batch_size_count") - runs == 50  # by tokens: two rows each
    assert (
        served.ask("/v1/predict", {"inputs": {"input_ids": [[4]] * 17, "attention_mask": [[1]] * 17}})["outputs"][
            "logits"
        ]
        == [[-2, 2]] * 17
    )
    assert served.counted("onnx_batch_size_count") - runs == 53  # by rows: eight each
    for rows, tokens in ((1, 65), (2, 4096), (1, 1 << 20)):
        body, length = binary(rows, tokens)
        assert "tokens" in served.refused(INFER, body, 413, **length)
    uneven = {"input_ids": [[4]] * 40, "attention_mask": [[1]]}
    assert "cannot be taken apart" in served.refused("/v1/predict", {"inputs": uneven}, 413)


def test_tensors_are_bounded_in_bytes_and_so_is_what_comes_of_them(starts: Serve, shelf: Path) -> None:
    served = starts(models.doubler(shelf / "bounds"), max_body_mb=1, max_tensor_mb=1).wait()
    assert "of JSON counts as" in served.refused("/v1/predict", b" " * (300 << 10), 413)
    rows = numpy.ones(((1 << 20) // 16 - 40, 4), "<f4")  # a binary body of nearly a MiB; the sums come on top of it
    told = tensor(shape=list(rows.shape), parameters={"binary_data_size": rows.nbytes})
    del told["inputs"][0]["data"]
    head = json.dumps(told).encode()
    length = {"inference-header-content-length": str(len(head))}
    assert "answer is larger than 1 MiB" in served.refused(INFER, head + rows.tobytes(), 413, **length)
