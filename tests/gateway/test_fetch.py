"""The gateway's own small questions to engines take nothing from the requests that share the connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from pierhead.gateway.faults import Fault
from pierhead.gateway.fetch import fetch
from pierhead.gateway.link import Endpoint
from pierhead.gateway.upstream import Answer, Target

QUESTION = b"GET /health HTTP/1.1\r\nhost: engine\r\n"
inside = pytest.mark.skipif(
    not isinstance(Target.take, FunctionType),
    reason="it takes the place of a class, which is not possible where they are compiled",
)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"  # and it stays open, whatever it was told


class Waiting:
    """A request that got the connection as soon as it was free."""

    def __init__(self) -> None:
        self.heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def on_whole(self, answer: Answer, body: bytes) -> None:
        self.heard.set_result(body)

    def on_lost(self, reason: str, pristine: bool) -> None:
        self.heard.set_exception(ConnectionError(reason))


class Eager(Target):
    """An engine for whose connections somebody always waits."""

    waiting: Any = None

    def give_back(self, conn: Any, answer: Answer) -> None:
        super().give_back(conn, answer)
        if self.waiting is None and self.take() is conn:
            self.waiting = Waiting()
            conn.begin(self.waiting, QUESTION + b"\r\n", (b"",), False)


class Watched(Target):
    """An engine that tells when a connection to it has been let go of."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.forgot = asyncio.Event()

    def forget(self, conn: Any) -> None:
        super().forget(conn)
        self.forgot.set()


@contextlib.asynccontextmanager
async def engine(folder: Path, answer: bytes) -> AsyncIterator[Endpoint]:
    """Answers every request on every connection, and closes none."""
    open_ones: list[asyncio.StreamWriter] = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.append(writer)
        while await reader.readline():
            while (await reader.readline()).strip():
                pass
            writer.write(answer)

    async with asyncio.timeout(20), await asyncio.start_unix_server(one, str(folder / "engine.sock")):
        yield Endpoint("r", str(folder / "engine.sock"))
        for writer in open_ones:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@inside
async def test_a_connection_that_the_engine_keeps_open_is_not_closed_under_the_request_that_has_it_by_then(
    tmp_path: Path,
) -> None:
    async with engine(tmp_path, ANSWER) as endpoint:
        target = Eager(endpoint)
        assert await fetch(target, QUESTION) == b"ok"
        assert await target.waiting.heard == b"ok"
        target.retire()


@inside
async def test_a_question_without_an_answer_in_time_lets_go_of_its_connection(tmp_path: Path) -> None:
    async with engine(tmp_path, ANSWER[:-2]) as endpoint:
        target = Watched(endpoint)
        with pytest.raises(Fault, match="did not answer in"):
            await fetch(target, QUESTION, timeout=0.2)
        await target.forgot.wait()
        assert target.take() is None
