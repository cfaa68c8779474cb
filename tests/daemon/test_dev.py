"""``pier dev``: a model that is served from its file, and anew at each save, by a real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from tests.conftest import CACHE

from .conftest import House
from .test_python_models import ask

pytestmark = pytest.mark.timeout(180)
PIER = str(Path(sys.prefix) / "bin" / "pier")
SOURCE = """
import time

class Model:
    def load(self, folder): ...
    def predict(self, x: int):
        time.sleep(0.02)
        return {"answer": x * 2}
"""


@dataclass
class Session:
    """A running ``pier dev``; ``next`` is what it says next."""

    process: subprocess.Popen[str]
    said: Queue[dict[str, Any] | None] = field(default_factory=Queue)

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.put(json.loads(line))
        self.said.put(None)

    def next(self, *wanted: str) -> dict[str, Any]:
        found = self.said.get(timeout=90)
        assert found is not None, "it has ended"
        assert found["event"] in wanted, found
        return found

    def until(self, wanted: str) -> dict[str, Any]:
        while (found := self.next(wanted, "saved", "same"))["event"] != wanted:
            pass
        return found


@dataclass
class Work:
    """A house with a daemon, and a file that is worked on."""

    house: House
    address: str
    file: Path

    def dev(self, source: str, stack: contextlib.ExitStack) -> Session:
        self.file.write_text(source)
        words = [PIER, "dev", str(self.file), "mine", "--json"]
        process = subprocess.Popen(words, env=self.house.env, stdout=subprocess.PIPE, text=True)
        made = Session(process)
        thread = threading.Thread(target=made.listen)
        thread.start()
        stack.callback(lambda: process.stdout and process.stdout.close())
        stack.callback(thread.join, 10)
        stack.callback(process.wait, 60)
        stack.callback(process.send_signal, signal.SIGTERM)
        return made

    @property
    def running(self) -> list[str]:
        return [one["id"] for one in self.house.client.get("/replicas") if one["model"] == "mine"]


@pytest.fixture
def work(house: House, tmp_path: Path) -> Work:
    house.env["PIERHEAD_RUNTIME__ENVIRONMENTS"] = os.environ.get(
        "PIERHEAD_RUNTIME__ENVIRONMENTS", str(CACHE / "engines")
    )
    address = house.start()["listeners"][0]
    (tmp_path / "work").mkdir()
    return Work(house, address, tmp_path / "work" / "my_model.py")


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


def test_a_save_brings_the_new_answer_and_a_broken_one_leaves_the_old(work: Work, stack: contextlib.ExitStack) -> None:
    address, file, dev = work.address, work.file, work.dev(SOURCE, stack)
    dev.next("serving")
    body = {"model": "mine", "x": 3}
    assert ask(address, "/v1/predict", body) == (200, {"answer": 6})

    over, answers = threading.Event(), list[Any]()

    def customer() -> None:
        while not over.is_set():
            answers.append(ask(address, "/v1/predict", body))

    customers = [threading.Thread(target=customer) for _ in range(4)]
    for one in customers:
        one.start()
    try:
        file.write_text(SOURCE.replace("x * 2", "x * 10"))
        assert dev.next("saved")["files"] == ["my_model.py"]
        dev.until("serving")
    finally:
        over.set()
        for one in customers:
            one.join()
    assert {json.dumps(a) for a in answers} == {'[200, {"answer": 6}]', '[200, {"answer": 30}]'}, "none was dropped"
    assert ask(address, "/v1/predict", body) == (200, {"answer": 30})
    assert len(work.running) == 1

    for broken, reason in (
        (
            SOURCE.replace("def load(self, folder): ...", "def load(self, folder): raise OSError('no weights')"),
            "OSError",
        ),
        ("class Model:\n    def predict(self, x: int) return x\n", "my_model.py, line 2"),
    ):
        file.write_text(broken)
        said = dev.until("refused")
        assert reason in said["error"]["message"]
        assert said["serving"]
        assert ask(address, "/v1/predict", body) == (200, {"answer": 30})

    file.write_text(SOURCE.replace("x * 2", "x * 100"))
    dev.until("serving")
    assert ask(address, "/v1/predict", body) == (200, {"answer": 300})
    (file.parent / "notes.txt").write_text("not a part of it")
    file.write_text(file.read_text())
    assert dev.next("saved")["files"] == ["my_model.py"]
    assert dev.next("same")

    dev.process.send_signal(signal.SIGINT)
    dev.next("ended")
    assert dev.process.wait(60) == 0
    assert work.running == []
    assert not work.house.client.get("/models/mine")["damaged"]
    assert ask(address, "/v1/predict", body) == (200, {"answer": 300}), "the model stays in the store"


def test_what_is_broken_from_the_beginning_is_served_when_it_is_mended(work: Work, stack: contextlib.ExitStack) -> None:
    dev = work.dev("class Model:\n    def predict(self) return 1\n", stack)
    said = dev.next("refused")
    assert (said["serving"], said["error"]["message"][:19]) == ("", "my_model.py, line 2")
    work.file.write_text(SOURCE)
    dev.until("serving")
    assert ask(work.address, "/v1/predict", {"model": "mine", "x": 1}) == (200, {"answer": 2})
