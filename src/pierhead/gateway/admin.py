"""The gateway's end of the link to the daemon: takes snapshots, asks for models, reports; lives on without it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable

import msgspec

from pierhead.gateway.faults import Fault, from_pier_error
from pierhead.gateway.link import (
    Drain,
    Endpoint,
    EnsureReady,
    HandOver,
    Hello,
    Report,
    Snapshot,
    Sockets,
    StartProgress,
    StartResult,
    ToDaemon,
    ToGateway,
)
from pierhead.gateway.listeners import Listening

_LINE_MAX = 32 << 20
_ABSENT_GRACE = 10.0  # seconds that a waiting request gives a daemon that went away to come back
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ToGateway).decode


class _Wish:
    """A model that requests wait for; all of them share one EnsureReady."""

    __slots__ = ("future", "message", "progress", "waiters")

    def __init__(self, message: EnsureReady, future: asyncio.Future[Endpoint]) -> None:
        self.message = message
        self.future = future
        self.waiters = 0
        self.progress = ""


class LinkServer:
    """Serves the admin socket; ``on_snapshot`` and ``on_drain`` are the composition's."""

    def __init__(
        self,
        hello: Callable[[], Hello],
        report: Callable[[], Report | None],
        listening: Callable[[], list[Listening]],
        on_snapshot: Callable[[Snapshot], None],
        on_drain: Callable[[float], None],
        start_timeout: float,
    ) -> None:
        self._hello = hello
        self._report = report
        self._listening = listening
        self._on_snapshot = on_snapshot
        self._on_drain = on_drain
        self._start_timeout = start_timeout
        self._daemon: socket.socket | None = None
        self._outbox: asyncio.Queue[ToDaemon] = asyncio.Queue()
        self._wishes: dict[tuple[str, str], _Wish] = {}
        self._ids = 0
        self._poked = False
        self._absence: asyncio.TimerHandle | None = None

    # --- for requests ---------------------------------------------------------------------------------------------

    async def ensure_ready(self, model: str, failed: str) -> Endpoint:
        """An endpoint for ``model``; Fault when the daemon is away, fails to start it, or takes too long."""
        wish = self._wishes.get((model, failed))
        if wish is None:
            if self._daemon is None and self._absence is None:
                raise self._absent(model)
            self._ids += 1
            message = EnsureReady(id=self._ids, model=model, failed=failed)
            wish = self._wishes[model, failed] = _Wish(message, asyncio.get_running_loop().create_future())
            self.say(message)
        wish.waiters += 1
        try:
            async with asyncio.timeout(self._start_timeout):
                return await asyncio.shield(wish.future)
        except TimeoutError as exc:
            text = f"the model '{model}' did not start within {self._start_timeout:g} s."
            raise Fault(504, "start_timeout", text, hint="See: pier ps") from exc
        finally:
            wish.waiters -= 1
            if not wish.waiters and self._wishes.get((model, failed)) is wish:
                del self._wishes[model, failed]
                wish.future.cancel()

    def progress(self, model: str) -> str:
        """How the start of ``model`` gets on, in a few words; "" when nothing was heard of it."""
        return next((w.progress for (name, _), w in self._wishes.items() if name == model), "")

    def _heard(self, news: StartProgress) -> None:
        for wish in self._wishes.values():
            if wish.message.id == news.id:
                detail = f" ({news.detail[:200]})" if news.detail else ""
                wish.progress = f"{news.state}{detail} {news.elapsed_s:.1f}s"

    def _absent(self, model: str) -> Fault:
        text = f"the model '{model}' does not run, and no Pierhead daemon answers that could start it."
        return Fault(503, "daemon_unavailable", text, hint="Start one with: pier serve")

    def _settle(self, result: StartResult) -> None:
        for key, wish in list(self._wishes.items()):
            if wish.message.id != result.id:
                continue
            del self._wishes[key]
            if wish.future.done():
                continue
            if result.endpoint is not None:
                wish.future.set_result(result.endpoint)
            else:
                wish.future.set_exception(from_pier_error(result.error or {}))
                wish.future.exception()  # seen, even when the last waiter has just left

    def _give_up(self) -> None:
        """The daemon did not come back in time."""
        self._absence = None
        for (model, _), wish in self._wishes.items():
            if not wish.future.done():
                wish.future.set_exception(self._absent(model))
                wish.future.exception()
        self._wishes.clear()

    # --- for the composition --------------------------------------------------------------------------------------

    def poke(self) -> None:
        """Something worth a report happened; reports that come close together become one."""
        if not self._poked and self._daemon is not None:
            self._poked = True
            asyncio.get_running_loop().call_later(0.02, self.send_report)

    def send_report(self) -> None:
        """Report what changed, if anything did."""
        self._poked = False
        if self._daemon is not None:
            report = self._report()
            if report is not None:
                self.say(report)

    def say(self, message: ToDaemon) -> None:
        """Tell the daemon, if one is there."""
        if self._daemon is not None and self._outbox.qsize() < 10000:
            self._outbox.put_nowait(message)

    async def serve(self, admin: socket.socket) -> None:
        """Accept daemons until cancelled; the newest one is the one that is spoken to."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            try:
                while True:
                    sock, _ = await loop.sock_accept(admin)
                    if _same_user(sock):
                        group.create_task(self._talk(sock))
                    else:
                        sock.close()
            finally:
                if self._absence is not None:
                    self._absence.cancel()

    async def _talk(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._outbox = outbox = asyncio.Queue[ToDaemon]()
        self._daemon = sock
        if self._absence is not None:
            self._absence.cancel()
            self._absence = None
        outbox.put_nowait(self._hello())
        for wish in self._wishes.values():
            outbox.put_nowait(wish.message)
        sender = asyncio.get_running_loop().create_task(self._send_all(sock, outbox))
        try:
            with contextlib.suppress(OSError):
                await self._read_all(sock)
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sender
            sock.close()
            if self._daemon is sock:
                self._daemon = None
                self._absence = asyncio.get_running_loop().call_later(_ABSENT_GRACE, self._give_up)

    async def _send_all(self, sock: socket.socket, outbox: asyncio.Queue[ToDaemon]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            message = await outbox.get()
            line = _encode(message) + b"\n"
            if isinstance(message, Sockets):
                fds = [item.sock.fileno() for item in self._listening()]
                sent = socket.send_fds(sock, [line], fds)
                line = line[sent:]
            if line:
                await loop.sock_sendall(sock, line)

    async def _read_all(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        pending = bytearray()
        while data := await loop.sock_recv(sock, 262144):
            pending += data
            if b"\n" not in data:
                if len(pending) > _LINE_MAX:
                    return
                continue
            *lines, rest = bytes(pending).split(b"\n")
            pending = bytearray(rest)
            for line in lines:
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            message = _decode(line)
            if isinstance(message, Snapshot):
                self._on_snapshot(message)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            print(f"pierhead gateway: a message of the daemon is not usable: {exc}", file=sys.stderr)  # noqa: T201
            return
        if isinstance(message, StartResult):
            self._settle(message)
        elif isinstance(message, StartProgress):
            self._heard(message)
        elif isinstance(message, Drain):
            self._on_drain(message.grace)
        elif isinstance(message, HandOver):
            self.say(Sockets(addresses=tuple(item.address for item in self._listening())))


def _same_user(sock: socket.socket) -> bool:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", raw)[1] in (0, os.getuid())
