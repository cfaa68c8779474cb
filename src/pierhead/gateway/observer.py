"""The gateway's end of the process beside it (``telemetry``): tells it what happened, drops when it lags.

Redaction, spans and log files would take the interpreter away from the event loop; in a process of their own they take
another core. It ends when the gateway does, and is started again when it ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import subprocess
import sys
from typing import Any, cast

from pierhead.gateway.outcome import Outcome
from pierhead.gateway.telemetry.messages import Batch, Exchange, Setup, frame

_BACKLOG = 32 << 20  # bytes on their way to the process
_FEW = 1000  # outcomes of one turn
_RESTART = 1.0
_END = 5.0
_COUNT = struct.Struct("<I")


class Observer(asyncio.Protocol):
    """``dropped`` counts outcomes, lines and exchanges that were not sent or not kept."""

    def __init__(self, setup: Setup) -> None:
        self.dropped = 0
        self.setup = setup
        self._log = bool(setup.settings.access_log)
        self._outcomes = self._log or bool(setup.endpoint)
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._batch = Batch()
        self._full = False  # whether a flush is due
        self._closing = False
        self._said = b""
        self._start: asyncio.Task[None] | None = None

    # --- what happened --------------------------------------------------------------------------------------------

    def put(self, outcome: Outcome) -> None:
        """One request."""
        if self._outcomes and self._room(len(self._batch.outcomes)):
            self._batch.outcomes.append(outcome)

    def put_local(self, facts: dict[str, Any]) -> None:
        """One answer that no model gave."""
        if self._log and self._room(len(self._batch.local)):
            self._batch.local.append(facts)

    def put_exchange(self, exchange: Exchange) -> None:
        """One request to be recorded."""
        if self._room(len(self._batch.exchanges)):
            self._batch.exchanges.append(exchange)

    def _room(self, count: int) -> bool:
        if count >= _FEW:
            self.dropped += 1
            return False
        if not self._full:
            self._full = True
            asyncio.get_running_loop().call_soon(self._flush)
        return True

    def _flush(self) -> None:
        self._full = False
        batch, self._batch = self._batch, Batch()
        transport = self._transport
        if transport is None or transport.get_write_buffer_size() > _BACKLOG:
            self.dropped += len(batch.outcomes) + len(batch.local) + len(batch.exchanges)
            return
        transport.write(frame(batch))

    # --- the process ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start the process."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        mine.setblocking(False)
        with theirs:
            argv = [sys.executable, "-m", "pierhead.gateway.telemetry"]
            self._process = subprocess.Popen(argv, stdin=theirs.fileno(), cwd="/")  # noqa: ASYNC220  # milliseconds
        await asyncio.get_running_loop().create_connection(lambda: self, sock=mine)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(frame(self.setup))

    def data_received(self, data: bytes) -> None:
        """The process tells how many things it had to drop."""
        self._said += data
        whole = len(self._said) // _COUNT.size * _COUNT.size
        self.dropped += sum(number for (number,) in _COUNT.iter_unpack(self._said[:whole]))
        self._said = self._said[whole:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._said = b""
        if not self._closing:
            asyncio.get_running_loop().call_later(_RESTART, self._again)

    def _again(self) -> None:
        if self._process is not None:
            self._process.poll()
        if not self._closing:
            self._start = asyncio.get_running_loop().create_task(self.open())

    def reopen(self) -> None:
        """Have it open its log files anew."""
        if self._process is not None and self._transport is not None:
            self._process.send_signal(signal.SIGHUP)

    async def close(self) -> None:
        """Let it write what it has, for some seconds."""
        self._closing = True
        if self._full:
            self._flush()
        if self._transport is not None:
            self._transport.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _END)
