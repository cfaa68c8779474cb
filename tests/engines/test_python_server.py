"""The server of Python models, as a real process on a unix socket, with classes of every kind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest

from pierhead.engines.programs.python.calls import Calls
from pierhead.engines.serving import PROGRAMS

pytestmark = pytest.mark.timeout(60)


@dataclass
class Server:
    """A started server: ``ask`` gives status, headers and body."""

    place: Path
    process: subprocess.Popen[bytes]
    log: Path

    def send(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30)
        connection.sock.connect(str(self.place))
        with contextlib.closing(connection):
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(
                "GET" if body is None else "POST", path, data, {"content-type": "application/json", **headers}
            )
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def ask(self, path: str, body: Any = None) -> Any:
        status, _, data = self.send(path, body)
        assert status == 200, data
        return json.loads(data)

    def refused(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        status, _, data = self.send(path, body)
        return status, json.loads(data)["error"]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[bytes]] = []

    def start(text: str, cls: str = "Model", *, fails: bool = False, **settings: Any) -> Any:
        folder = tmp_path / "m"
        folder.mkdir(exist_ok=True)
        (folder / "mine.py").write_text(textwrap.dedent(text))
        place, log = tmp_path / "engine.sock", tmp_path / "log"
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        ready.bind(str(tmp_path / "notify.sock"))
        ready.settimeout(30)
        told = json.dumps({"name": "mine", "module": "mine", "cls": cls, **settings})
        with log.open("wb") as out, ready:
            argv = [
                sys.executable,
                "-I",
                str(PROGRAMS),
                "python",
                "--socket",
                str(place),
                "--model-dir",
                str(folder),
                "--settings",
                told,
            ]
            process = subprocess.Popen(argv, stdout=out, stderr=out)
            started.append(process)
            if fails:
                process.wait(30)
                return log.read_text()
            assert ready.recv(64) == b"READY=1", log.read_text()
        return Server(place, process, log)

    yield start
    for process in started:
        process.kill()
        process.wait(10)


TYPED = """
    from pydantic import BaseModel, Field

    class Review(BaseModel):
        text: str = Field(min_length=1)
        stars: int = 3

    class Verdict(BaseModel):
        label: str
        size: int

    class Model:
        '''Says whether a review is good.'''

        def load(self, folder):
            self.words = {"good"}
            self.sizes = []

        def predict(self, reviews: list[Review]) -> list[Verdict]:
            if any(r.text == "boom" for r in reviews):
                raise ValueError("cannot take boom")
            labels = ["yes" if self.words & set(r.text.split()) else "no" for r in reviews]
            return [Verdict(label=label, size=len(reviews)) for label in labels]
"""


def test_requests_that_come_together_are_one_batch_and_a_bad_one_fails_alone(serve: Any) -> None:
    server = serve(TYPED, max_batch_size=8, batch_delay_ms=200)
    assert server.ask("/v1/predict", {"model": "mine", "text": "good film"}) == {"label": "yes", "size": 1}
    with ThreadPoolExecutor(8) as pool:
        texts = ["good", "bad", "boom", "fine", "good x", "y"]
        found = list(pool.map(lambda text: server.send("/v1/predict", {"model": "mine", "text": text}), texts))
    assert [status for status, _, _ in found] == [200, 200, 500, 200, 200, 200]
    assert [json.loads(body).get("label") for _, _, body in found] == ["yes", "no", None, "no", "yes", "no"]
    with ThreadPoolExecutor(8) as pool:
        sizes = pool.map(lambda at: server.ask("/v1/predict", {"text": f"t{at}"})["size"], range(8))
    assert max(sizes) > 1


def test_batches_for_a_method_that_takes_no_list_are_refused(serve: Any) -> None:
    log = serve("class Model:\n    def predict(self, x: int): return x", max_batch_size=2, fails=True)
    assert "gets a list; it takes int: take list[int]" in log


def test_what_is_wrong_with_a_request_is_said_in_one_sentence_and_no_traceback_leaves(serve: Any) -> None:
    server = serve(TYPED, max_batch_size=8)
    status, error = server.refused("/v1/predict", {"model": "mine", "stars": "many"})
    assert (status, error["code"], error["param"]) == (422, "invalid_input", "text")
    assert error["message"] == (
        "text: Field required; stars: Input should be a valid integer, unable to parse string as an integer"
    )
    assert server.refused("/v1/predict", b"{")[0] == 422
    assert server.refused("/v1/predict", b"[" * 100_000)[0] in (400, 422)
    assert server.refused("/v1/predict", [1])[0] == 422
    status, error = server.refused("/v1/predict", {"text": "boom"})
    assert (status, error["message"]) == (500, "the model failed: ValueError: cannot take boom")
    log = server.log.read_text()
    assert 'mine.py", line' in log
    assert "raise ValueError" in log
    assert "fastapi" not in log, "only the model's own frames help its author"


def test_its_openapi_document_has_the_models_own_types(serve: Any) -> None:
    document = serve(TYPED, max_batch_size=8).ask("/openapi.json")
    assert document["info"] == {"title": "mine", "version": "1", "description": "Says whether a review is good."}
    post = document["paths"]["/v1/predict"]["post"]
    assert post["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Review"}
    assert post["responses"]["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Verdict"}
    assert document["components"]["schemas"]["Review"]["properties"]["stars"]["default"] == 3


def test_plain_annotations_are_the_members_of_a_request(serve: Any) -> None:
    server = serve(
        """
        import datetime, numpy as np

        class Model:
            def predict(self, x: float, y: float = 2.0, *, names: list[str] = []) -> dict:
                return {"sum": np.float32(x + y), "all": np.ones((2,)), "nan": float("nan"), "names": names,
                        "day": datetime.date(2026, 1, 2)}
        """
    )
    assert server.ask("/v1/predict", {"model": "mine", "x": 1, "names": ["a"]}) == {
        "sum": 3.0, "all": [1.0, 1.0], "nan": None, "names": ["a"], "day": "2026-01-02",
    }  # fmt: skip
    assert server.refused("/v1/predict", {"x": 1, "z": 2})[1]["message"] == "z: Extra inputs are not permitted"


def test_generators_plain_and_async_stream_and_stop_when_nobody_listens(serve: Any) -> None:
    server = serve(
        """
        import asyncio, pathlib

        class Model:
            def load(self, folder):
                self.ended = False

            async def predict(self, n: int):
                for i in range(n):
                    yield {"i": i}
                    await asyncio.sleep(0)
                if n == 3:
                    raise RuntimeError("three is too many")

            def chat(self, messages, temperature=1.0, **more):
                if messages[-1]["content"] == "ended?":
                    yield str(self.ended)
                    return
                try:
                    while True:
                        yield "again "
                finally:
                    self.ended = True
        """
    )
    _, headers, data = server.send("/v1/predict", {"n": 2})
    assert headers["content-type"].startswith("text/event-stream")
    assert data == b'data: {"i":0}\n\ndata: {"i":1}\n\ndata: [DONE]\n\n'
    assert server.ask("/v1/predict", {"n": 2, "stream": False}) == [{"i": 0}, {"i": 1}]
    data = server.send("/v1/predict", {"n": 3})[2]
    assert b"three is too many" in data
    assert not data.endswith(b"[DONE]\n\n")
    asyncio.run(_hang_up(server.place))
    body = {"model": "mine", "messages": [{"role": "user", "content": "ended?"}]}
    assert server.ask("/v1/chat/completions", body)["choices"][0]["message"]["content"] == "True"


async def _hang_up(place: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(place)
    body = json.dumps({"model": "mine", "stream": True, "messages": [{"role": "user", "content": "go"}]}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    await reader.readuntil(b"again")
    writer.close()


def test_chat_gives_openais_answers_with_tools_usage_and_reasons(serve: Any) -> None:
    server = serve(
        """
        class Model:
            async def chat(self, messages, tools=None, max_tokens=None):
                if tools:
                    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                    return {"tool_calls": [call]}
                return {"content": f"{max_tokens}", "usage": {"prompt_tokens": 3, "completion_tokens": 1},
                        "finish_reason": "length"}

            def complete(self, prompt, stop=None):
                yield prompt
                yield "!"
        """
    )
    ask = {"model": "mine", "messages": [{"role": "user", "content": "x"}]}
    said = server.ask("/v1/chat/completions", {**ask, "max_completion_tokens": 5, "seed": 1})
    assert said["choices"][0]["message"]["content"] == "5"
    assert said["choices"][0]["finish_reason"] == "length"
    assert said["usage"]["total_tokens"] == 4
    called = server.ask("/v1/chat/completions", {**ask, "tools": [{"type": "function"}]})["choices"][0]
    assert called["finish_reason"] == "tool_calls"
    assert called["message"]["tool_calls"][0]["function"]["name"] == "f"
    assert server.ask("/v1/completions", {"model": "mine", "prompt": "hi"})["choices"][0]["text"] == "hi!"
    stream = server.send("/v1/chat/completions", {**ask, "stream": True, "stream_options": {"include_usage": True}})[2]
    events = [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: {")]
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"]] == [None, "length"]
    assert events[-1]["usage"]["total_tokens"] == 4
    assert server.refused("/v1/chat/completions", {"model": "mine", "messages": []})[0] == 422


def test_texts_become_vectors_classes_and_ranks_and_sound_becomes_text(serve: Any) -> None:
    server = serve(
        """
        import numpy as np

        class Model:
            def embed(self, texts):
                return np.array([[len(t), 0.5] for t in texts], dtype="float32")

            def classify(self, texts):
                return [{"long": 0.9, "short": 0.1} if len(t) > 3 else ("short", 0.8) for t in texts]

            def rerank(self, query, documents):
                return [d.count(query) for d in documents]

            def transcribe(self, audio, language="?"):
                return f"{len(audio)} bytes in {language}"
        """
    )
    assert server.ask("/v1/embeddings", {"input": "abc"})["data"][0]["embedding"] == [3.0, 0.5]
    packed = server.ask("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"})["data"][1]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == (1.0, 0.5)
    first, second = server.ask("/v1/classify", {"input": ["abcd", "x"]})["data"]
    assert (first["label"], first["probs"], first["num_classes"]) == ("long", [0.9, 0.1], 2)
    assert second["label"] == "short"
    ranked = server.ask("/v1/rerank", {"query": "a", "documents": ["b", "aa", {"text": "a"}], "top_n": 2})["results"]
    assert [(r["index"], r["relevance_score"]) for r in ranked] == [(1, 2.0), (2, 1.0)]
    form = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n12345\r\n'
    form += b'--B\r\nContent-Disposition: form-data; name="language"\r\n\r\nde\r\n--B--\r\n'
    said = server.send("/v1/audio/transcriptions", form, **{"content-type": "multipart/form-data; boundary=B"})
    assert json.loads(said[2]) == {"text": "5 bytes in de"}


def test_arrays_come_and_go_as_tensors_and_as_json(serve: Any) -> None:
    server = serve(
        """
        import numpy as np
        from numpy.typing import NDArray

        class Model:
            def predict(self, a: NDArray[np.float32], b: np.ndarray) -> np.ndarray:
                return a + b
        """
    )
    assert server.ask("/v1/predict", {"a": [[1, 2]], "b": [[3, 4]]}) == [[4.0, 6.0]]
    assert server.refused("/v1/predict", {"a": [[1], [2, 3]], "b": 1})[0] == 422
    one = {"name": "a", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    said = server.ask("/v2/models/mine/infer", {"inputs": [one, {**one, "name": "b"}]})
    assert said["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [1, 2], "data": [2.0, 4.0]}]
    status, error = server.refused("/v2/models/mine/infer", {"inputs": [one]})
    assert (status, error["message"]) == (422, "the input b is missing; the model takes a, b")
    for bad in ({}, {"inputs": [{**one, "shape": [3]}]}, {"inputs": [{**one, "datatype": "X"}]}, {"inputs": 1}):
        assert server.refused("/v2/models/mine/infer", bad)[0] == 422
    raw = numpy.ones(2, "float32").tobytes()
    parts = [
        {k: v for k, v in one.items() if k != "data"} | {"name": n, "parameters": {"binary_data_size": 8}} for n in "ab"
    ]
    head = json.dumps({"inputs": parts, "outputs": [{"name": "output", "parameters": {"binary_data": True}}]}).encode()
    key = "inference-header-content-length"
    _, headers, data = server.send("/v2/models/mine/infer", head + raw + raw, **{key: str(len(head))})
    assert numpy.frombuffer(data[int(headers[key]) :], "float32").tolist() == [2.0, 2.0]


def test_a_busy_plain_method_does_not_hold_up_the_server(serve: Any) -> None:
    server = serve(
        """
        import threading

        class Model:
            def load(self):
                self.go = threading.Event()

            def predict(self, x: int):
                return self.go.wait(20)

            async def classify(self, texts):
                self.go.set()
                return ["free"] * len(texts)
        """
    )
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(server.ask, "/v1/predict", {"x": 1})
        assert server.ask("/health") == {"status": "ok"}
        assert server.ask("/v1/classify", {"input": "now"})["data"][0]["label"] == "free"
        assert held.result(20) is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class Model:\n    def load(self): raise OSError('no weights')\n    def predict(self): ...",
         "engine: OSError: no weights (mine.py, line 2)"),
        ("import nowhere_at_all\nclass Model: ...",
         "engine: ModuleNotFoundError: No module named 'nowhere_at_all' (mine.py, line 1)"),
        ("class Model:\n    def predict(self) -> (: ...", "(mine.py, line 2)"),
        ("class Other: ...", "engine: mine has no class Model"),
        ("class Model:\n    def other(self): ...", "engine: the class Model has none of the methods"),
        ("class Model:\n    def predict(self, model: str): ...", "that word is the gateway's"),
        ("class Model:\n    def load(self): raise SystemExit", "the model ended the program while it was loaded"),
        ("import socket\nclass Model:\n    def predict(self, s: 'nothing.here'): ...", "is not known"),
    ],
)  # fmt: skip
def test_a_class_that_cannot_be_served_says_why_in_its_last_line(serve: Any, text: str, said: str) -> None:
    log = serve(text, fails=True)
    last = log.strip().splitlines()[-1]
    assert last.startswith("engine: ")
    assert said in last


def test_a_batch_whose_answers_are_too_few_is_an_error_of_the_model(serve: Any) -> None:
    server = serve("class Model:\n    def embed(self, texts): return [[1.0]]", max_batch_size=4)
    assert server.ask("/v1/embeddings", {"input": "one"})["data"][0]["embedding"] == [1.0]
    status, error = server.refused("/v1/embeddings", {"input": ["one", "two"]})
    assert (status, error["message"]) == (500, "the model was given 2 items and gave 1 answers")


def test_an_exception_with_a_status_is_an_answer_with_that_status(serve: Any) -> None:
    server = serve(
        """
        from fastapi import HTTPException

        class Model:
            def predict(self, x: int):
                raise HTTPException(409, "not now")
        """
    )
    assert server.refused("/v1/predict", {"x": 1}) == (
        409,
        {"message": "not now", "type": "invalid_request_error", "code": "refused_by_model", "param": None},
    )
    assert os.path.getsize(server.log) == 0


def test_a_generator_that_cannot_even_be_called_is_an_answer_in_one_piece_and_as_a_stream(serve: Any) -> None:
    server = serve("class Model:\n    def chat(self, messages, *, temperature):\n        yield 'hot'")
    body = {"model": "mine", "messages": [{"role": "user", "content": "go"}]}
    assert "temperature" in server.refused("/v1/chat/completions", body)[1]["message"]
    assert b"temperature" in server.send("/v1/chat/completions", {**body, "stream": True})[2]
    assert server.ask("/v1/chat/completions", {**body, "temperature": 1})["choices"][0]["message"]["content"] == "hot"


async def test_what_is_given_up_while_it_waits_for_a_thread_waits_no_more() -> None:
    calls, go = Calls(1), threading.Event()

    def words(text: str) -> Iterator[str]:
        yield text

    async def stream() -> list[Any]:
        return [piece async for piece in calls.stream(words, "a")]

    held = asyncio.create_task(calls.ask(go.wait, 20))
    queued = [asyncio.create_task(stream()), asyncio.create_task(calls.ask(str, 1))]
    async with asyncio.timeout(10):
        while calls.waiting != 2 or not calls.running:  # noqa: ASYNC110  # no event tells of it
            await asyncio.sleep(0)
    for task in queued:
        task.cancel()
    await asyncio.gather(*queued, return_exceptions=True)
    go.set()
    assert await held
    assert await stream() == ["a"]
    assert (calls.waiting, calls.running) == (0, 0)
