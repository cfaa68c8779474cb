"""Triton's real server behind a real daemon: models of each kind, in NVIDIA's own client's words, and its failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as aio
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from pierhead.config import RuntimeSettings
from pierhead.engines.base import PlanRequest
from pierhead.engines.triton import Triton
from pierhead.events import ignore
from pierhead.runtimes.docker import DockerRuntime
from pierhead.runtimes.readiness import wait_ready
from pierhead.store.model import ModelFile

pytestmark = pytest.mark.timeout(600)

DOUBLE = """
import triton_python_backend_utils as pb
class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "IN", "data_type": "TYPE_FP32", "dims": [-1]})
        config.add_output({"name": "OUT", "data_type": "TYPE_FP32", "dims": [-1]})
        config.set_max_batch_size(16)
        return config
    def execute(self, requests):
        return [
            pb.InferenceResponse([pb.Tensor("OUT", pb.get_input_tensor_by_name(r, "IN").as_numpy() * FACTOR)])
            for r in requests
        ]
"""
ENSEMBLE = """
platform: "ensemble"
max_batch_size: 16
input [ { name: "IN" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "SUM" data_type: TYPE_FP32 dims: [ -1 ] } ]
ensemble_scheduling {
  step [
    { model_name: "double" model_version: 1 input_map { key: "IN" value: "IN" } output_map { key: "OUT" value: "d" } },
    { model_name: "plus_one" model_version: -1 input_map { key: "X" value: "d" } output_map { key: "Y" value: "SUM" } }
  ]
}
"""


def plus_one(path: Path, operator: str = "Add") -> None:
    """An ONNX model: Y = X + 1."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    free = ["rows", "columns"]
    graph = helper.make_graph(
        [helper.make_node(operator, ["X", "one"], ["Y"])],
        "plus_one",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, free)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, free)],
        [one],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@dataclass
class Host:
    """One installation with a running daemon; ``url`` is its gateway's place."""

    home: Path
    env: dict[str, str]
    url: str

    def pier(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pierhead.cli.main", *words],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def package(self, folder: Path, name: str, *options: str) -> None:
        words = [word for option in options for word in ("--option", option)]
        self.pier("package", "--dir", str(folder), name, "--allow-unsafe", *words)

    def call(self, path: str, body: Any = None, timeout: float = 300) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://{self.url}{path}", data, timeout) as answer:
            text = answer.read()
        return json.loads(text) if text[:1] in (b"{", b"[") else text.decode()

    @property
    def client(self) -> triton.InferenceServerClient:
        return triton.InferenceServerClient(self.url, network_timeout=300, connection_timeout=300, concurrency=32)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    home = Path(tempfile.mkdtemp(prefix="pier-"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIERHEAD_") and k != "DOCKER_HOST"}
    env |= {
        "PIERHEAD_HOME": str(home),
        "PIERHEAD_GATEWAY__LISTEN": "127.0.0.1:0",
        "PIERHEAD_RUNTIME__DEFAULT": "process",
    }
    if "PIERHEAD_RUNTIME__ENVIRONMENTS" in os.environ:
        env["PIERHEAD_RUNTIME__ENVIRONMENTS"] = os.environ["PIERHEAD_RUNTIME__ENVIRONMENTS"]
    read, write = os.pipe()
    with (home / "serve.log").open("ab") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "pierhead.daemon", "--ready-fd", str(write)],
            env=env,
            pass_fds=(write,),
            stdout=log,
            stderr=log,
        )
    os.close(write)
    try:
        with os.fdopen(read, "rb") as pipe:
            assert select.select([pipe], [], [], 60)[0]
            said = json.loads(pipe.readline())
        url = next(a for a in said["listeners"] if a.startswith(("127.", "http"))).removeprefix("http://")
        yield Host(home, env, url)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)
        shutil.rmtree(home, ignore_errors=True)


def numbers(name: str, values: list[list[float]], binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput(name, [len(values), len(values[0])], "FP32")
    tensor.set_data_from_numpy(np.array(values, np.float32), binary_data=binary)
    return tensor


@pytest.fixture(scope="module")
def shop(host: Host, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A repository: a Python model in two versions, an ONNX model, and an ensemble of both."""
    folder = tmp_path_factory.mktemp("shop")
    put(folder / "double/1/model.py", DOUBLE.replace("FACTOR", "2"))
    put(folder / "double/2/model.py", DOUBLE.replace("FACTOR", "4"))
    put(folder / "double/config.pbtxt", 'backend: "python"\nversion_policy: { all { } }\n')
    plus_one(folder / "plus_one/1/model.onnx")
    put(folder / "pipeline/config.pbtxt", ENSEMBLE)
    host.package(folder, "shop")
    return "shop"


def test_an_ensemble_of_a_python_and_an_onnx_model_answers_nvidias_client(host: Host, shop: str) -> None:
    with contextlib.closing(host.client) as client:
        assert client.is_server_ready()
        for binary in (True, False):
            output = triton.InferRequestedOutput("SUM", binary_data=binary)
            found = client.infer(shop, [numbers("IN", [[1, 2, 3]], binary)], outputs=[output])
            assert found.as_numpy("SUM").tolist() == [[3, 5, 7]]


def test_each_model_of_the_repository_and_each_version_can_be_asked(host: Host, shop: str) -> None:
    with contextlib.closing(host.client) as client:
        inputs = [numbers("IN", [[1, 2]])]
        assert client.infer(f"{shop}/models/double", inputs).as_numpy("OUT").tolist() == [[4, 8]]
        first = client.infer(f"{shop}/models/double", inputs, model_version="1")
        assert first.as_numpy("OUT").tolist() == [[2, 4]]
        plus = client.infer(f"{shop}/models/plus_one", [numbers("X", [[1, 2]])])
        assert plus.as_numpy("Y").tolist() == [[2, 3]]
        with pytest.raises(InferenceServerException, match="nothing"):
            client.infer(f"{shop}/models/nothing", inputs)


def test_metadata_configuration_and_readiness_are_the_server_s_own(host: Host, shop: str) -> None:
    with contextlib.closing(host.client) as client:
        said = client.get_model_metadata(f"{shop}/models/plus_one")
        assert said["inputs"] == [{"name": "X", "datatype": "FP32", "shape": [-1, -1]}]
        assert client.get_model_metadata(f"{shop}/models/double")["versions"] == ["1", "2"]
        assert client.get_model_metadata(shop)["name"] == shop
        assert client.get_model_config(shop)["platform"] == "ensemble"
        assert client.is_model_ready(shop)
        assert client.is_model_ready(f"{shop}/models/double", "2")
        assert not client.is_model_ready(f"{shop}/models/double", "7")


def test_generate_takes_plain_json(host: Host, shop: str) -> None:
    said = host.call(f"/v2/models/{shop}/models/double/generate", {"IN": [1.5]})
    assert said["OUT"] == 6.0


def test_models_are_listed_unloaded_and_loaded_again(host: Host, shop: str) -> None:
    with contextlib.closing(host.client) as client:
        name = f"{shop}/models/plus_one"
        client.infer(name, [numbers("X", [[1]])])
        states = {m["name"]: m.get("state") for m in client.get_model_repository_index()}
        assert states[shop] == states[name] == "READY"
        client.unload_model(name)
        deadline, state = time.monotonic() + 20, ""
        while state != "UNAVAILABLE" and time.monotonic() < deadline:
            state = {m["name"]: m.get("state") for m in client.get_model_repository_index()}[name]
        assert state == "UNAVAILABLE"
        assert [r["state"] for r in json.loads(host.pier("ps", "--json")) if r["model"] == shop] == ["ready"]
        with pytest.raises(InferenceServerException, match=r"not ready|unknown model|no available"):
            client.infer(name, [numbers("X", [[1]])])
        client.load_model(name)
        assert client.infer(name, [numbers("X", [[1]])]).as_numpy("Y").tolist() == [[2]]


async def test_requests_at_the_same_time_are_answered_as_batches(host: Host, tmp_path: Path) -> None:
    plus_one(tmp_path / "model.onnx")
    host.package(tmp_path, "batched", "engine=triton", "max-queue-delay=20000", "preferred-batch-size=8")
    async with aio.InferenceServerClient(host.url, conn_limit=64, conn_timeout=300) as client:

        async def one(number: int) -> float:
            return (await client.infer("batched", [numbers("X", [[number]])])).as_numpy("Y").item()

        async def counted() -> dict[str, Any]:
            return (await client.get_inference_statistics("batched"))["model_stats"][0]

        await one(0)
        before = await counted()
        assert await asyncio.gather(*(one(n) for n in range(64))) == [n + 1 for n in range(64)]
        after = await counted()
    requests = after["inference_count"] - before["inference_count"]
    runs = after["execution_count"] - before["execution_count"]
    assert requests == 64
    assert runs <= 32, f"{runs} runs for {requests} requests"
    assert "nv_inference_request_success" in host.call("/metrics")
    assert 'nv_inference_queue_duration_us{model="batched"' in host.call("/metrics")


@pytest.mark.parametrize(
    ("name", "text", "operator", "said"),
    [
        ("typo", "max_batch_sise: 4", "Add", "max_batch_sise"),
        ("python", 'backend: "python"', "Add", "model.py"),
        ("operator", "max_batch_size: 4", "NoSuchOperator", "NoSuchOperator"),
        ("backend", 'backend: "no_such_backend"', "Add", "no_such_backend"),
    ],
)
def test_a_model_that_triton_refuses_is_refused_with_its_reason(
    host: Host, tmp_path: Path, name: str, text: str, operator: str, said: str
) -> None:
    plus_one(tmp_path / "bad/1/model.onnx", operator)
    put(tmp_path / "bad/config.pbtxt", text)
    host.package(tmp_path, f"bad-{name}")
    with contextlib.closing(host.client) as client, pytest.raises(InferenceServerException) as refused:
        client.infer(f"bad-{name}", [numbers("X", [[1]])])
    message = refused.value.message()
    assert said in message
    assert "engine: the model could not be loaded" in message
    assert len(message) < 1200


def test_stopping_takes_no_while_and_leaves_nothing(host: Host, shop: str) -> None:
    with contextlib.closing(host.client) as client:
        client.infer(shop, [numbers("IN", [[1]])])
        mine = [p for p in psutil.process_iter(["name"]) if "triton" in p.info["name"] and _of(p, host)]
        assert mine
        for model in {r["model"] for r in json.loads(host.pier("ps", "--json"))}:
            began = time.monotonic()
            host.pier("stop", model)
            assert time.monotonic() - began < 8
    _, alive = psutil.wait_procs(mine, timeout=5)
    assert not alive
    assert not list(Path("/dev/shm").glob("pierhead-*"))


def _of(process: psutil.Process, host: Host) -> bool:
    """Whether a process is below one of this installation's."""
    with contextlib.suppress(psutil.Error):
        return any(str(host.home) in word for parent in process.parents() for word in parent.cmdline())
    return False


@pytest.mark.docker
async def test_the_wheel_s_server_runs_in_a_container_without_network(tmp_path: Path) -> None:
    image, socket = os.environ.get("PIERHEAD_TEST_IMAGE"), os.environ.get("PIERHEAD_TEST_DOCKER")
    libraries = [Path("/lib/x86_64-linux-gnu") / n for n in ("libpython3.11.so.1.0", "libexpat.so.1", "libz.so.1")]
    if not image or not socket or not shutil.which("docker"):
        pytest.skip("PIERHEAD_TEST_DOCKER and PIERHEAD_TEST_IMAGE name no Docker Engine and no image")
    if not all(p.exists() for p in libraries):
        pytest.skip("this machine has no shared library of Python 3.11 to give to the image")
    base = tmp_path / "base"  # the official image has the library, the one of the tests does not
    put(base / "Dockerfile", f"FROM {image}\nCOPY *.so* /usr/lib/x86_64-linux-gnu/\n")
    for library in libraries:
        shutil.copy(library, base)
    build = ["docker", "build", "--quiet", "--tag", "pierhead-test-triton-base", str(base)]
    env = os.environ | {"DOCKER_HOST": socket}
    await asyncio.to_thread(subprocess.run, build, env=env, check=True, timeout=120, capture_output=True)
    plus_one(tmp_path / "model/model.onnx")
    engine = Triton("pierhead-test-triton-base:latest")
    files = (ModelFile("model.onnx", 200, "weights", format="onnx"),)
    asked = PlanRequest("rtriton", "m", tmp_path / "model", files, {}, {}, 8 << 30, 2)
    with tempfile.TemporaryDirectory(prefix="pier-", dir="/tmp") as root:
        runtime = DockerRuntime(Path(root), RuntimeSettings(docker_host=socket))
        spec = await runtime.prepare(engine.plan(asked).spec, ignore)
        instance = await runtime.start(spec)
        try:
            await wait_ready(instance, timeout=120)
            reader, writer = await asyncio.open_unix_connection(instance.socket)
            body = b'{"inputs":[{"name":"X","shape":[1,2],"datatype":"FP32","data":[1,2]}]}'
            head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: e\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % len(body) + body)
            assert b'"data":[2.0,3.0]' in await asyncio.wait_for(reader.read(), 30)
            writer.close()
        finally:
            await instance.stop()
            await runtime.close()
