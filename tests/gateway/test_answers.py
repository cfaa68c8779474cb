"""The store of answers: found by their own key only, within bounds, safe from the death of a process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pierhead.gateway.answers import Answers
from pierhead.gateway.dialects.base import Save
from pierhead.gateway.faults import Fault


@pytest.fixture(params=["file", "memory"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "answers.db" if request.param == "file" else None


@pytest.fixture
def opened() -> Iterator[list[Answers]]:
    made: list[Answers] = []
    yield made
    for answers in made:
        answers.close()


def store(opened: list[Answers], file: Path | None, **bounds: float) -> Answers:
    limits = {"most": 100, "most_bytes": 1 << 20, "age": 3600.0} | bounds
    answers = Answers(file, most=int(limits["most"]), most_bytes=int(limits["most_bytes"]), age=limits["age"])
    opened.append(answers)
    return answers


async def test_what_a_key_stored_no_other_key_finds(opened, file) -> None:
    answers = store(opened, file)
    await answers.keep("k1", (Save("resp_a", b"mine"),))
    assert await answers.load("k1", "resp_a") == b"mine"
    assert await answers.load("k2", "resp_a") is None
    assert await answers.change("k2", "resp_a", lambda _: None) is None
    assert await answers.load("k1", "resp_a") == b"mine"


async def test_what_is_appended_needs_something_to_stand_behind(opened, file) -> None:
    answers = store(opened, file)
    await answers.keep("k", (Save("conv_a", b"1\n", append=True),))
    assert await answers.load("k", "conv_a") is None
    await answers.keep("k", (Save("conv_a", b"0\n"), Save("conv_a", b"\xff1\n", append=True)))
    assert await answers.load("k", "conv_a") == b"0\n\xff1\n"


async def test_changes_and_additions_at_once_lose_nothing(opened, file) -> None:
    answers = store(opened, file)
    await answers.keep("k", (Save("conv_a", b""),))
    adds = [answers.keep("k", (Save("conv_a", b"a", append=True),)) for _ in range(50)]
    edits = [answers.change("k", "conv_a", lambda body: body + b"b") for _ in range(50)]
    await asyncio.gather(*adds, *edits)
    assert sorted(await answers.load("k", "conv_a") or b"") == [97] * 50 + [98] * 50


async def test_the_oldest_go_when_there_are_too_many(opened, file) -> None:
    answers = store(opened, file, most=10)
    for number in range(25):
        await answers.keep("k", (Save(f"r{number}", b"x"),))
    left = [number for number in range(25) if await answers.load("k", f"r{number}")]
    assert left == list(range(15, 25))


async def test_the_oldest_go_when_they_are_too_large_together(opened, file) -> None:
    answers = store(opened, file, most_bytes=1000)
    for number in range(10):
        await answers.keep("k", (Save(f"r{number}", b"x" * 300),))
    assert [number for number in range(10) if await answers.load("k", f"r{number}")] == [7, 8, 9]
    await answers.keep("k", (Save("r9", b"y", append=True), Save("huge", b"x" * 2000)))
    assert await answers.load("k", "huge") is None


async def test_the_old_are_not_found_any_more(opened, file) -> None:
    answers = store(opened, file, age=0.2)
    await answers.keep("k", (Save("a", b"x"),))
    assert await answers.load("k", "a") == b"x"
    await asyncio.sleep(0.25)
    assert await answers.load("k", "a") is None


async def test_an_edit_that_refuses_changes_nothing(opened, file) -> None:
    answers = store(opened, file)
    await answers.keep("k", (Save("a", b"x"),))

    def refuse(_: bytes) -> bytes:
        raise Fault(404, "absent", "no")

    with pytest.raises(Fault):
        await answers.change("k", "a", refuse)
    assert await answers.load("k", "a") == b"x"


async def test_what_is_added_by_changes_stays_within_the_bounds_too(opened, file) -> None:
    answers = store(opened, file, most_bytes=1000)
    await answers.keep("k", tuple(Save(f"conv_{n}", b"x" * 150) for n in range(6)))
    with pytest.raises(Fault) as caught:
        await answers.change("k", "conv_0", lambda body: body * 2)
    assert caught.value.status == 413
    for n in range(6):
        await answers.change("k", f"conv_{n}", lambda body: body + b"x" * 100)
    left = [await answers.load("k", f"conv_{n}") for n in range(6)]
    assert sum(len(body) for body in left if body is not None) <= 1000
    assert left[5] is not None


async def test_two_gateways_use_one_file(opened, tmp_path) -> None:
    old, new = (store(opened, tmp_path / "answers.db") for _ in range(2))
    saves = [a.keep("k", (Save(f"{name}{n}", b"x"),)) for n in range(40) for name, a in (("o", old), ("n", new))]
    await asyncio.gather(*saves)
    assert all([await old.load("k", f"n{n}") and await new.load("k", f"o{n}") for n in range(40)])


async def test_only_the_owner_can_read_the_file(opened, tmp_path) -> None:
    await store(opened, tmp_path / "answers.db").keep("k", (Save("a", b"x"),))
    assert (tmp_path / "answers.db").stat().st_mode & 0o077 == 0


async def test_a_store_that_cannot_be_written_is_a_fault_and_no_loss_of_the_gateway(opened, tmp_path) -> None:
    answers = store(opened, tmp_path / "absent" / "answers.db")
    with pytest.raises(Fault) as caught:
        await answers.keep("k", (Save("a", b"x"),))
    assert caught.value.status == 507
    (tmp_path / "absent").mkdir()
    await answers.keep("k", (Save("a", b"x"),))
    assert await answers.load("k", "a") == b"x"


WRITER = """
import asyncio, sys
from pathlib import Path
from pierhead.gateway.answers import Answers
from pierhead.gateway.dialects.base import Save

async def main():
    answers = Answers(Path(sys.argv[1]), most=10**6, most_bytes=1 << 30, age=3600.0)
    for number in range(10**6):
        await answers.keep("k", (Save(f"r{number}", b"x" * 5000),))
        print(number, flush=True)

asyncio.run(main())
"""


async def test_what_was_kept_survives_kill_9(opened, tmp_path) -> None:
    file = tmp_path / "answers.db"
    writer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, str(file), stdout=asyncio.subprocess.PIPE
    )
    assert writer.stdout is not None
    deadline = time.monotonic() + 20
    last = -1
    while last < 50:
        assert time.monotonic() < deadline
        last = int(await writer.stdout.readline())
    os.kill(writer.pid, signal.SIGKILL)
    rest, _ = await writer.communicate()
    said = [last, *(int(line) for line in rest.splitlines() if line.isdigit())]
    answers = store(opened, file)
    assert all([await answers.load("k", f"r{number}") for number in range(max(said[:-1] or said) + 1)])
