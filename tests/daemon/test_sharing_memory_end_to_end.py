"""Two real models under a budget that holds one: each answers in turn, and a busy one is waited for."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from pierhead.events import Ready

from .conftest import House, UnixConnection

MIB = 1 << 20
BUDGET = {"PIERHEAD_FLEET__MEMORY_BUDGET": str(330 * MIB), "PIERHEAD_ENGINE__MEMORY_RESERVE": str(32 * MIB)}

pytestmark = pytest.mark.model


def packaged(house: House, name: str, context: int) -> None:
    words = ("package", "--from", "smollm2", "--context-size", str(context), name)
    subprocess.run([sys.executable, "-m", "pierhead.cli.main", *words], env=house.env, check=True, capture_output=True)


def running(house: House) -> dict[str, dict[str, Any]]:
    return {r["model"]: r for r in house.client.get("/api/v1/replicas") if r["state"] == "ready"}


def test_models_take_turns_and_a_stream_is_never_cut_for_another(house: House) -> None:
    packaged(house, "one", 512)
    packaged(house, "other", 768)
    house.start(**BUDGET)
    assert house.chat("one")[0] == 200
    first = running(house)
    assert set(first) == {"one"}
    assert first["one"]["memory_estimate"] > 100 * MIB
    connection, response = house.ask("one", 200, stream=True)
    answered: list[tuple[int, dict[str, Any]]] = []
    with contextlib.closing(connection):
        response.readline()  # it streams
        waiting = threading.Thread(target=lambda: answered.append(house.chat("other")))
        waiting.start()
        whole = response.read().decode()
    waiting.join(90)
    ends = [json.loads(line[6:]) for line in whole.splitlines() if line.startswith("data: {")]
    assert ends[-1]["choices"][0]["finish_reason"] == "length"
    assert answered[0][0] == 200
    assert set(running(house)) == {"other"}
    assert house.chat("one")[0] == 200  # and back
    peaks = json.loads((house.paths.state / "memory-peaks.json").read_bytes())
    assert {p["context"] for p in peaks.values()} >= {512}
    assert all(p["memory"] > 100 * MIB for p in peaks.values())


def test_embeddings_of_a_model_that_writes_stay_within_what_is_claimed_where_they_were_asked_for(house: House) -> None:
    """The longest text that is embedded at a time: its words' logits are several times the model's own weights."""
    house.start()
    body = {"model": "smollm2", "settings": {"embeddings": True, "context": 1024}}
    assert [e for e in house.client.events("POST", "/replicas", body) if isinstance(e, Ready)]
    claimed = running(house)["smollm2"]["memory_estimate"]
    connection = UnixConnection(house.paths.gateway_socket)
    with contextlib.closing(connection):
        asked = json.dumps({"model": "smollm2", "input": "word " * 500})
        connection.request("POST", "/v1/embeddings", asked, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert json.loads(response.read())["usage"]["prompt_tokens"] > 490
    deadline = time.monotonic() + 30
    while (
        peak := running(house)["smollm2"]["memory_peak"]
    ) <= claimed - 8 * 512 * 49152:  # it is looked at now and then
        assert time.monotonic() < deadline
    assert peak < claimed * 1.05
