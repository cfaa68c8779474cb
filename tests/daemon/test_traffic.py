"""Queues in front of a real model: a daemon, its gateway and SmolLM2 with one slot."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.model


def test_a_cold_start_tells_how_it_gets_on_and_a_second_request_waits_for_the_slot(house: Any) -> None:
    traffic = json.dumps({"*": {"notice": 0.01}})
    house.start(PIERHEAD_GATEWAY__TRAFFIC=traffic)

    def stream(tokens: int) -> tuple[dict[str, str], str]:
        connection, response = house.ask(tokens=tokens, stream=True)
        with contextlib.closing(connection):
            return {k.lower(): v for k, v in response.getheaders()}, response.read().decode()

    head, text = stream(2)
    comments = [line for line in text.splitlines() if line.startswith(":")]
    assert head["x-pierhead-queue-position"] == "1"
    assert any("loading" in line for line in comments), comments
    assert text.rstrip().endswith("data: [DONE]")

    with ThreadPoolExecutor(3) as pool:
        told = [answer for answer in pool.map(stream, (40, 40, 40))]
    assert all(text.rstrip().endswith("data: [DONE]") for _, text in told)
    places = sorted(head.get("x-pierhead-queue-position", "0") for head, _ in told)
    assert places[0] == "0"
    assert places[-1] in ("1", "2")
    assert any(": queued position=" in text for _, text in told)
