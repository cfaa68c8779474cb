"""The usage journal: a line for every answer before it has left, whatever becomes of the gateway."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from pierhead.gateway import journal_lines as journal
from pierhead.gateway import link
from pierhead.gateway.journal import Journal
from pierhead.gateway.outcome import Outcome
from pierhead.gateway.usage import Usage

WORDS = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}


def outcome(number: int, **more) -> Outcome:
    given = {
        "id": f"req_{number}", "time": 1e9, "key": "key_a", "operation": "chat", "dialect": "openai", "asked": "m",
        "model": "m", "replica": "r", "status": 200, "ok": True, "stream": False, "usage": Usage(12, 3, 5, True),
    }  # fmt: skip
    return Outcome(**(given | more))


def read(folder: Path) -> list[journal.Line]:
    return [line for path, _ in journal.files(folder) for line in journal.lines(path.read_bytes())[0]]


def test_lines_are_read_while_more_are_written(tmp_path):
    book = Journal(tmp_path / "usage")
    for number in range(3):
        book.put(outcome(number))
        found = read(tmp_path / "usage")
        assert [line.id for line in found] == [f"req_{n}" for n in range(number + 1)]
    assert found[0] == journal.Line(1e9, "req_0", "key_a", "chat", "m", 200, True, 12, 5, 3, 0, 0.0)
    ((path, _),) = journal.files(tmp_path / "usage")
    with path.open("rb") as file:
        assert not journal.sealed(file.fileno())
        book.close()
        assert journal.sealed(file.fileno())
    assert path.read_bytes().endswith(b"\n")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_file_is_followed_by_another(tmp_path):
    book = Journal(tmp_path)
    for number in range(10_000):
        book.put(outcome(number))
    book.close()
    assert len(journal.files(tmp_path)) == 2
    assert [line.id for line in read(tmp_path)] == [f"req_{n}" for n in range(10_000)]
    assert book.lost == 0


def test_journals_that_nobody_takes_away_have_a_bound(tmp_path):
    book = Journal(tmp_path, most=1 << 20)
    for number in range(20_000):
        book.put(outcome(number))
    assert sum(size for _, size in journal.files(tmp_path)) <= 1 << 20
    assert book.lost == 20_000 - len(read(tmp_path)) > 0


def test_a_folder_that_cannot_be_written_costs_the_line_and_nothing_else(tmp_path):
    (tmp_path / "usage").write_text("a file")
    book = Journal(tmp_path / "usage")
    book.put(outcome(1))
    book.put(outcome(2, model="x" * 100_000))
    assert book.lost == 2


@pytest.mark.parametrize("torn", [b'[1000000000.0,"req_1","key_a","ch', b'[1000000000.0,"req_1"\0\0\0"key_a"]\n'])
def test_a_torn_last_line_is_left_alone(tmp_path, torn):
    book = Journal(tmp_path)
    book.put(outcome(0))
    book.close()
    ((path, _),) = journal.files(tmp_path)
    whole = path.read_bytes()
    lines, taken, damaged = journal.lines(whole + torn + b"\0" * 4096)
    assert ([line.id for line in lines], taken, damaged) == (["req_0"], len(whole), 0)


def test_a_damaged_line_costs_no_other(tmp_path):
    book = Journal(tmp_path)
    book.put(outcome(0))
    book.put(outcome(1))
    book.close()
    first, second = journal.files(tmp_path)[0][0].read_bytes().splitlines(keepends=True)
    lines, taken, damaged = journal.lines(first + b"{nonsense\n" + b"\xff\n" + second)
    assert [line.id for line in lines] == ["req_0", "req_1"]
    assert damaged == 2
    assert taken == len(first) + len(second) + 12


async def test_every_answer_that_a_client_has_whole_outlives_kill_9(new_gate, new_engine, folder, http, chat):
    async def answer(call):
        if b"stream" in call.body:
            await call.sse()
            await call.event({"usage": WORDS, "choices": []})
            await call.event(b"[DONE]")
            await call.end()
        else:
            await call.json({"choices": [], "usage": WORDS})

    engine = await new_engine(answer)
    gate = await new_gate(extra={"state": str(folder)})
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    answered: list[str] = []
    many = asyncio.Event()

    async def client(number: int) -> None:
        wire = await gate.wire()
        try:
            for turn in range(100_000):
                name = f"c{number}-{turn}"
                body = chat | ({"stream": True} if turn % 2 else {})
                await wire.send(http("POST", "/v1/chat/completions", body, {"x-request-id": name}))
                await wire.answer()
                answered.append(name)
                if len(answered) == 400:
                    many.set()
        except (OSError, EOFError):
            return

    clients = [asyncio.create_task(client(n)) for n in range(8)]
    async with asyncio.timeout(20):
        await many.wait()
    os.kill(gate.pid, signal.SIGKILL)
    await asyncio.gather(*clients)
    written = [line.id for line in read(folder / "usage")]
    assert set(answered) <= set(written)
    assert len(written) == len(set(written)) <= len(answered) + len(clients)
    assert {(line.prompt, line.cached, line.completion) for line in read(folder / "usage")} == {(12, 5, 3)}


async def test_what_a_drain_cuts_at_its_grace_is_written_too(new_gate, new_engine, folder, http, chat):
    async def stall(call):
        await call.sse()
        await call.event({"choices": [], "usage": WORDS})
        await call.reader.read()

    engine = await new_engine(stall)
    gate = await new_gate(extra={"state": str(folder)})
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    wire = await gate.wire()
    await wire.send(
        http("POST", "/v1/chat/completions", chat | {"stream": True, "stream_options": {"include_usage": True}})
    )
    await wire.head()
    await wire.reader.readuntil(b"usage")
    gate.say(link.Drain(grace=0.2))
    async with asyncio.timeout(10):
        assert await gate.process.wait() == 0
    (line,) = read(folder / "usage")
    assert (line.ok, line.prompt, line.completion) == (False, 12, 3)


async def test_failed_requests_are_written_too(new_gate, new_engine, folder, chat):
    async def fail(call):
        await call.json({"error": {"message": "no"}}, 500)

    engine = await new_engine(fail)
    gate = await new_gate(extra={"state": str(folder)})
    await gate.serve(link.Route(name="m", endpoints=(engine.endpoint,)))
    await gate.ask("POST", "/v1/chat/completions", chat)
    (line,) = read(folder / "usage")
    assert (line.status >= 500, line.ok, line.model) == (True, False, "m")
