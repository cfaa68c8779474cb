"""`pier push` to a hub: what it prints, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
from tests.sources.hub_double import TOKEN, HubDouble, hub_double

from pierhead.paths import Paths

from .conftest import Pier

Stocked = tuple[Pier, Paths, dict[str, str]]


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    """The double, served from a thread: the command is another process."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    found: list[HubDouble] = []
    stop = asyncio.Event()

    async def serve() -> None:
        async with hub_double() as double:
            double.part = 40_000_000
            found.append(double)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def test_a_push_to_a_hub_prints_the_address_of_the_commit(stocked: Stocked, hub: HubDouble) -> None:
    pier = stocked[0]
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    done = pier("push", "smollm2", "hf:me/smollm2", "--message", "Hello", **env)
    assert done.returncode == 0, done.stderr
    head = hub.repos["me/smollm2"].branches["main"]
    assert done.stdout.strip().endswith(head)
    assert "Pushed hf:me/smollm2" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert hub.repos["me/smollm2"].messages[-1] == "Hello"
    again = pier("push", "smollm2", "hf:me/smollm2", "--json", **env)
    last = json.loads(again.stdout.splitlines()[-1])
    assert (last["type"], last["commit"], last["sent"]) == ("push_done", head, 0)
    assert hub.problems == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smollm2", "localhost:5000/a/b:v1", "--private"], "are for hubs"),
        (["smollm2", "hf:me/x:Q4_0"], "more than a repository"),
        (["smollm2", "hf:me/x"], "only with a token"),
        (["smollm2", "hf:me/x", "--card", "/none.md"], "cannot read the card"),
    ],
)
def test_a_push_that_cannot_be_made_says_why_and_what_next(stocked: Stocked, arguments: list[str], words: str) -> None:
    done = stocked[0]("push", *arguments, HF_TOKEN="", HF_TOKEN_PATH="/none")
    assert done.returncode != 0
    assert words in done.stderr.replace("\n", " ")
