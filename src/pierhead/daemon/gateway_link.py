"""The daemon's end of the link to the gateway: keeps one running, tells it what to serve, does what it asks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from pierhead.config import GatewaySettings
from pierhead.daemon import gateway_process as processes
from pierhead.errors import PierError, RuntimeUnavailable
from pierhead.events import AnyEvent, Listener, Phase
from pierhead.gateway.link import (
    Activity,
    Drain,
    Endpoint,
    EnsureReady,
    HandOver,
    Hello,
    KeepLoaded,
    Report,
    Snapshot,
    Sockets,
    StartProgress,
    StartResult,
    ToDaemon,
    ToGateway,
)
from pierhead.gateway.listeners import bind_tcp, parse_address
from pierhead.paths import Paths

log = logging.getLogger(__name__)

_MAX_LINE = 16 * 1024 * 1024
_RETRY = (0.0, 0.2, 1.0, 5.0)

Ensure = Callable[[str, str, Listener], Awaitable[Endpoint]]
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ToDaemon).decode


class _Wire:
    """One connection to a gateway: whole messages in and out, and the descriptors that came with them."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fds: list[int] = []
        self._data = b""
        self._sending = asyncio.Lock()

    async def send(self, message: ToGateway) -> None:
        async with self._sending:
            await asyncio.get_running_loop().sock_sendall(self.sock, _encode(message) + b"\n")

    async def receive(self) -> ToDaemon | None:
        """The next message; None when the other end is gone."""
        while b"\n" not in self._data:
            await self._readable()
            try:
                chunk, fds, _, _ = socket.recv_fds(self.sock, 262144, 64)
            except BlockingIOError:
                continue
            except OSError:
                return None
            self.fds += fds
            if not chunk or len(self._data) > _MAX_LINE:
                return None
            self._data += chunk
        line, _, self._data = self._data.partition(b"\n")
        return _decode(line)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self.sock, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self.sock)

    def close_fds(self) -> None:
        """What came along is of no more use."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def close(self) -> None:
        self.close_fds()
        self.sock.close()


class GatewayLink:
    """Owns the link; ``snapshot(version)`` says what the gateway must know, ``ensure`` starts a model for it."""

    def __init__(
        self,
        *,
        paths: Paths,
        settings: GatewaySettings,
        snapshot: Callable[[int], Snapshot],
        ensure: Ensure,
        activity: Callable[[Activity], None],
        keep: Callable[[str, float], None],
        lost: Callable[[], None],
    ) -> None:
        self._paths = paths
        self._settings = settings
        self._snapshot = snapshot
        self._ensure = ensure
        self._activity = activity
        self._keep = keep
        self._lost = lost
        self._wire: _Wire | None = None
        self._dirty = asyncio.Event()
        self._version = 0
        self._applied = -1
        self._told = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._old: set[_Wire] = set()  # to gateways that drain
        self._open: dict[_Wire, dict[str, int]] = {}  # the requests under way, by gateway and replica
        self._spawned: list[processes.Spawned] = []
        self._closing = False
        self.hello: Hello | None = None
        self.connections = 0
        self.problems: tuple[str, ...] = ()

    @property
    def connected(self) -> bool:
        return self._wire is not None

    @property
    def listeners(self) -> tuple[str, ...]:
        """Where clients reach the gateway."""
        return tuple(a for a in self.hello.listeners if not a.startswith("unix:")) if self.hello else ()

    def push(self) -> None:
        """Send a new snapshot soon; many calls in a row make one."""
        self._dirty.set()

    # --- connecting -----------------------------------------------------------------------------------------------

    async def open(self, early: processes.Spawned | None = None) -> None:
        """Reach a gateway: the one just spawned, one that runs, or a new one. Raises what keeps one from starting."""
        if early is None:
            sock = processes.connect(self._paths)
            if sock is not None:
                return await self._greet_old(_Wire(sock))
            processes.retire_strays(self._paths)
            early = processes.spawn(self._paths, self._settings, self._snapshot(0))
        await self._greet_new(early)

    async def _greet_new(self, spawned: processes.Spawned) -> None:
        self._spawned.append(spawned)
        await processes.listening(self._paths, spawned)
        sock = processes.connect(self._paths)
        if sock is None:
            raise RuntimeUnavailable("the gateway ended at once", hint=f"See {self._paths.state}/gateway.log.")
        self._wire = _Wire(sock)
        self.hello = await self._hello(self._wire)
        await self._send_snapshot()

    async def _greet_old(self, wire: _Wire) -> None:
        """Go on with a gateway that runs, or put a new one in its place without losing a connection."""
        hello = await self._hello(wire)
        if processes.runs_alike(self._paths, self._settings, hello.pid):
            processes.retire_strays(self._paths, hello.pid)
            self._wire, self.hello = wire, hello
            await self._send_snapshot()
            return
        log.info("replacing gateway %d (version %s)", hello.pid, hello.version)
        await wire.send(HandOver())
        missed: list[ToDaemon] = []
        while not isinstance(message := await wire.receive(), Sockets):
            if message is None:
                wire.close()
                return await self.open()
            missed.append(message)
        inherit, own = self._wanted(wire, message)
        try:
            spawned = processes.spawn(self._paths, self._settings, self._snapshot(0), inherit)
        finally:
            for sock in own:
                sock.close()
        await self._greet_new(spawned)
        wire.close_fds()
        self._spawn(self._see_off(wire, missed))
        processes.retire_strays(self._paths, spawned.process.pid)

    async def _see_off(self, wire: _Wire, missed: list[ToDaemon]) -> None:
        """Let a gateway drain and do what it asks meanwhile: its requests may wait for a model to start."""
        self._old.add(wire)
        try:
            await wire.send(self._snapshot(self._version))  # after which it tells what is open
            await wire.send(Drain(self._settings.request_timeout))
            for message in missed:
                self._heard(message, wire)
            while (message := await wire.receive()) is not None:
                self._heard(message, wire)
        except OSError as exc:
            log.warning("the gateway that was replaced is gone: %s", exc)
        finally:
            self._old.discard(wire)
            for replica in self._open.pop(wire, {}):
                self._activity(Activity(replica, self._open_at(replica)))
            wire.close()

    def _wanted(self, wire: _Wire, sockets: Sockets) -> tuple[list[tuple[int, str]], list[socket.socket]]:
        """What a new gateway takes over of an old one's sockets, and those bound anew for it."""
        have = dict(zip(sockets.addresses, wire.fds, strict=True))
        inherit = [(fd, address) for address, fd in have.items() if address.startswith("unix:")]
        own: list[socket.socket] = []
        for wanted in self._settings.listen:
            host, port = parse_address(wanted)
            name = f"[{host}]" if ":" in host else host
            match = [a for a in have if (a.startswith(name + ":") if port == 0 else a == f"{name}:{port}")]
            if match:
                inherit.append((have[match[0]], match[0]))
            else:
                bound = bind_tcp(wanted)
                own.append(bound.sock)
                inherit.append((bound.sock.fileno(), bound.address))
        return inherit, own

    async def _hello(self, wire: _Wire) -> Hello:
        message = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(processes.START_TIMEOUT):
                message = await wire.receive()
        if not isinstance(message, Hello):
            wire.close()
            raise RuntimeUnavailable(
                f"what listens on {self._paths.gateway_admin_socket} does not answer as a gateway",
                hint="End that process, then start the daemon again.",
            )
        return message

    # --- serving --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the link until cancelled; a gateway that dies is started again."""
        pusher = asyncio.create_task(self._push_all())
        try:
            await self._read_all()
            while not self._closing:
                self._drop()
                await self._reopen()
                await self._read_all()
        finally:
            pusher.cancel()
            if self._wire is not None:
                self._wire.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(pusher, *self._tasks, return_exceptions=True)

    async def _reopen(self) -> None:
        attempt = 0
        while self._wire is None:
            await asyncio.sleep(_RETRY[min(attempt, len(_RETRY) - 1)])
            attempt += 1
            try:
                await self.open()
            except (PierError, OSError, TimeoutError) as exc:
                log.error("cannot start the gateway again: %s", exc)
        log.warning("the gateway had ended; started it again")

    async def _read_all(self) -> None:
        while self._wire is not None and (message := await self._wire.receive()) is not None:
            self._heard(message, self._wire)

    def _heard(self, message: ToDaemon, wire: _Wire) -> None:
        if isinstance(message, EnsureReady):
            self._spawn(self._serve(message, wire))
        elif isinstance(message, Report):
            self._take(message, wire)
        elif isinstance(message, KeepLoaded):
            self._keep(message.model, message.seconds)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _open_at(self, replica: str) -> int:
        """How many requests are under way there, of all gateways."""
        return sum(each.get(replica, 0) for each in self._open.values())

    def _take(self, report: Report, wire: _Wire) -> None:
        here = self._open.setdefault(wire, {})
        for activity in report.activity:
            here[activity.replica] = activity.open
            self._activity(msgspec.structs.replace(activity, open=self._open_at(activity.replica)))
            if not activity.open:
                del here[activity.replica]
        if wire is not self._wire:
            return
        self.connections = report.connections
        self.problems = report.problems
        self._applied = report.snapshot
        told, self._told = self._told, asyncio.Event()
        told.set()

    async def settled(self, timeout: float = 1.0) -> None:
        """Return once the gateway acts on what holds now, as its report says, or after ``timeout`` seconds."""
        wanted = self._version + 1 if self._dirty.is_set() else self._version
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._wire is not None and self._applied < wanted:
                    await self._told.wait()

    def _drop(self) -> None:
        if self._wire is not None:
            self._open.pop(self._wire, None)
            self._wire.close()
        self._wire = None
        self._applied = -1
        self.connections = 0
        self._lost()

    async def _serve(self, wish: EnsureReady, wire: _Wire) -> None:
        try:
            ready = await self._ensure(wish.model, wish.failed, lambda event: self._progress(wish.id, event, wire))
            result = StartResult(id=wish.id, endpoint=ready)
        except PierError as exc:
            told = exc.to_dict()
            if any(str(line).startswith("Traceback (") for line in exc.data.get("log", ())):
                told["data"] = {name: value for name, value in exc.data.items() if name != "log"}  # not for clients
            result = StartResult(id=wish.id, error=told)
        except Exception as exc:  # a bug must not leave a client waiting
            log.exception("ensure_ready(%s)", wish.model)
            result = StartResult(id=wish.id, error=PierError(f"internal error: {exc!r}").to_dict())
        await self._answer(result, wire)

    def _progress(self, wish: int, event: AnyEvent, wire: _Wire) -> None:
        if isinstance(event, Phase):
            news = StartProgress(id=wish, state=event.state, detail=event.detail, elapsed_s=event.elapsed_s)
            self._spawn(self._answer(news, wire))

    async def _answer(self, message: ToGateway, wire: _Wire) -> None:
        """Tell the gateway that asked: another one has other wishes under the same numbers."""
        if wire is self._wire or wire in self._old:
            with contextlib.suppress(OSError):
                await wire.send(message)

    async def _push_all(self) -> None:
        while True:
            await self._dirty.wait()
            with contextlib.suppress(OSError):
                await self._send_snapshot()

    async def _send_snapshot(self) -> None:
        self._dirty.clear()
        self._version += 1
        if self._wire is not None:
            await self._wire.send(self._snapshot(self._version))

    def reopen_logs(self) -> None:
        """Tell the gateway that somebody has moved log files away."""
        if self._wire is not None and self.hello is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.hello.pid, signal.SIGHUP)

    # --- ending ---------------------------------------------------------------------------------------------------

    async def hurry(self) -> None:
        """End the gateway, and those that drain, without waiting for their streams."""
        for wire in (self._wire, *self._old):
            if wire is not None:
                with contextlib.suppress(OSError):
                    await wire.send(Drain(0))

    async def close(self, *, drain: bool, grace: float = 30.0) -> None:
        """End the link, and with ``drain`` the gateway too once its streams have ended or ``grace`` seconds passed."""
        self._closing = True
        wire = self._wire
        if wire is None:
            return
        if drain and self.hello is not None:
            with contextlib.suppress(OSError, ProcessLookupError):
                fd = os.pidfd_open(self.hello.pid)
                try:
                    await wire.send(Drain(grace))
                    await asyncio.to_thread(select.select, [fd], [], [], grace + 5)
                finally:
                    os.close(fd)
        for spawned in self._spawned:
            spawned.process.poll()
