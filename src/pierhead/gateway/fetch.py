"""One small question of the gateway itself to an engine, and the whole answer, bounded in time and size."""

from __future__ import annotations

import asyncio

from pierhead.gateway.faults import Fault, from_engine
from pierhead.gateway.upstream import Answer, Target


class _Whole:
    """Receives one answer of bounded size."""

    def __init__(self, limit: int) -> None:
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.status = 0
        self._limit = limit
        self._pieces: list[bytes] = []
        self._size = 0

    def on_whole(self, answer: Answer, body: bytes) -> None:
        self.status = answer.head.status
        self._finish(body)

    def on_head(self, answer: Answer) -> None:
        self.status = answer.head.status

    def on_piece(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            self.on_lost(f"the engine's answer is longer than {self._limit} bytes", False)
        else:
            self._pieces.append(piece)

    def on_end(self) -> None:
        self._finish(b"".join(self._pieces))

    def on_lost(self, reason: str, pristine: bool) -> None:
        if not self.done.done():
            self.done.set_exception(Fault(502, "engine_failed", f"{reason}.", source="engine"))

    def _finish(self, body: bytes) -> None:
        if not self.done.done():
            self.done.set_result(body)


async def fetch(target: Target, head: bytes, body: bytes = b"", *, limit: int = 1 << 20, timeout: float = 2.0) -> bytes:
    """The body of a 200; Fault as the engine gave it, or 502/504 when it does not answer.

    ``head`` is the request line and headers without their end; framing is added here.
    """
    try:
        async with asyncio.timeout(timeout):
            conn = await target.connect(timeout)
            whole = _Whole(limit)
            try:
                framing = b"content-length: %d\r\n" % len(body) if body else b""
                conn.begin(whole, head + framing + b"connection: close\r\n\r\n", (body,), False)
                found = await whole.done
            finally:
                conn.leave(whole)
    except TimeoutError as exc:
        raise Fault(504, "engine_timeout", f"the engine did not answer in {timeout:g} s.", source="engine") from exc
    except OSError as exc:
        raise Fault(502, "engine_failed", "the engine does not listen.", source="engine") from exc
    if whole.status != 200:
        raise from_engine(whole.status, found) if target.outside is None else target.outside.fault(whole.status, found)
    return found
