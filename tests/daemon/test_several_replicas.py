"""Two engines of one real model: a daemon, its gateway and SmolLM2; spread, killed, adopted and drained."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from pierhead.errors import UsageError
from pierhead.events import Ready

pytestmark = pytest.mark.model


def pair(house: Any, **extra: Any) -> list[dict[str, Any]]:
    """Both replicas, once they answer."""
    *_, last = house.client.events("POST", "/replicas", {"model": "smollm2", "replicas": 2, **extra})
    assert isinstance(last, Ready)
    return until(house, lambda found: [r["state"] for r in found] == ["ready", "ready"])


def until(house: Any, reached: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """The replicas as soon as they are so."""
    deadline = time.monotonic() + 30
    while not reached(found := house.client.get("/replicas")):
        assert time.monotonic() < deadline, found
    return found


def engine(replica: dict[str, Any]) -> int:
    """The program that answers, below whatever wraps it."""
    top = psutil.Process(replica["pid"])
    return max([top, *top.children(recursive=True)], key=lambda p: p.memory_info().rss).pid


def answered(house: Any, count: int) -> list[str]:
    """Which replica each of so many requests went to, as the access log has it, written a moment after the answer."""
    deadline = time.monotonic() + 10
    while len(lines := (house.paths.state / "access.log").read_text().splitlines()) < count:
        assert time.monotonic() < deadline
    return [json.loads(line)["replica"] for line in lines]


def pier(house: Any, *args: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "pierhead.cli.main", *args]
    return subprocess.run(run, env=house.env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("policy", "used"), [("round-robin", 2), ("cache", 1)])
def test_requests_are_spread_or_kept_by_their_beginning_as_the_policy_says(house: Any, policy: str, used: int) -> None:
    traffic = json.dumps({"smollm2": {"policy": policy}})
    house.start(PIERHEAD_GATEWAY__TRAFFIC=traffic, PIERHEAD_GATEWAY__ACCESS_LOG=str(house.paths.state / "access.log"))
    ids = {r["id"] for r in pair(house)}
    prompt = "One, two, three. " * 30  # more than the block of 256 bytes by which prompts are compared
    assert [house.chat(prompt=prompt)[0] for _ in range(4)] == [200] * 4
    seen = answered(house, 4)
    assert len(seen) == 4
    assert set(seen) <= ids
    assert len(set(seen)) == used
    if used == 2:
        assert sorted(map(seen.count, ids)) == [2, 2]


def test_a_second_replica_is_like_the_first_whatever_was_changed_meanwhile(running: Any) -> None:
    *_, last = running.client.events("POST", "/replicas", {"model": "smollm2"})
    assert isinstance(last, Ready)
    assert running.client.request("GET", "/settings/smollm2")["pending"] == []
    wanted = {"set": {"parallel": 3, "kv_cache_type": "q8_0", "context": 512}}
    changed = running.client.request("PATCH", "/settings/smollm2", wanted)
    assert changed["pending"] == ["cache_type_k", "cache_type_v", "context", "parallel"]
    assert "until its next start: cache_type_k" in pier(running, "settings", "smollm2").stderr

    running.kill()  # and it is known to the next daemon, too
    assert "error" not in running.start()
    one, other = pair(running)
    alike = ("parallel", "context", "memory_estimate", "engine")
    assert {k: other[k] for k in alike} == {k: one[k] for k in alike}
    assert running.client.request("GET", "/settings/smollm2")["pending"] == changed["pending"]

    running.client.request("DELETE", "/replicas/smollm2")
    fresh = pair(running)
    assert [(r["parallel"], r["context"]) for r in fresh] == [(3, 512)] * 2
    assert running.client.request("GET", "/settings/smollm2")["pending"] == []


def test_a_killed_engine_loses_no_new_request_and_comes_back(running: Any) -> None:
    one, other = pair(running)
    os.kill(engine(one), signal.SIGKILL)
    for _ in range(4):
        status, answer = running.chat()
        assert status == 200, answer
    found = until(running, lambda found: [r["state"] for r in found] == ["ready", "ready"])
    assert [(r["id"], r["restarts"]) for r in found] == [(one["id"], 1), (other["id"], 0)]


def test_the_next_daemon_goes_on_with_both_and_one_too_many_is_drained(running: Any) -> None:
    before = pair(running, keep_alive=1234)
    running.kill()
    assert running.chat()[0] == 200
    assert "error" not in running.start()
    after = running.client.get("/replicas")
    assert [(r["id"], r["pid"], r["wanted"]) for r in after] == [(r["id"], r["pid"], 2) for r in before]
    assert running.chat()[0] == 200

    connection, response = running.ask(tokens=200, stream=True)
    with contextlib.closing(connection):
        assert response.readline().startswith(b"data: ")
        until(running, lambda found: sum(r["requests_open"] for r in found) == 1)
        (busy,) = [r["id"] for r in running.client.get("/replicas") if r["requests_open"]]
        list(running.client.events("POST", "/replicas", {"model": "smollm2", "replicas": 1}))
        until(running, lambda found: [r["id"] for r in found] == [busy])
        assert response.read().rstrip().endswith(b"data: [DONE]")


def test_pier_shows_each_and_stops_one_for_good_or_all(running: Any) -> None:
    started = pier(running, "run", "smollm2", "Hi", "--max-tokens", "2", "--replicas", "2")
    assert started.returncode == 0, started.stderr
    one, other = until(running, lambda found: [r["state"] for r in found] == ["ready", "ready"])
    shown = pier(running, "ps").stdout
    assert one["id"] in shown
    assert other["id"] in shown
    stopped = pier(running, "stop", one["id"])
    assert "smollm2 keeps 1 replica now" in stopped.stderr
    assert running.chat()[0] == 200
    (left,) = running.client.get("/replicas")
    assert (left["id"], left["wanted"]) == (other["id"], 1)
    assert json.loads(pier(running, "stop", "smollm2", "--json").stdout) == {
        "stopped": [other["id"]],
        "kept": {"smollm2": 0},
    }
    assert running.client.get("/replicas") == []


def test_numbers_that_cannot_be_are_refused(running: Any) -> None:
    for count in (0, 65, "two"):
        with pytest.raises(UsageError):
            list(running.client.events("POST", "/replicas", {"model": "smollm2", "replicas": count}))
    assert pier(running, "run", "smollm2", "Hi", "--replicas", "65").returncode == UsageError.exit_code
    assert running.client.get("/replicas") == []
