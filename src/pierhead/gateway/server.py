"""Puts the gateway together: listeners, connections, the link, the sweep and the end; the only place that does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from pathlib import Path

import msgspec

import pierhead
from pierhead.config import GatewaySettings
from pierhead.gateway.admin import LinkServer
from pierhead.gateway.admission import Doorkeeper, host_of
from pierhead.gateway.budgets import Budgets
from pierhead.gateway.ledger import Ledger, MemoryLedger, SqliteLedger
from pierhead.gateway.link import Hello, Report, Snapshot
from pierhead.gateway.listeners import Listening, bind_tcp, bind_unix, check_exposure, inherit
from pierhead.gateway.local import Locals
from pierhead.gateway.ports import Ports
from pierhead.gateway.probes import probe
from pierhead.gateway.protocol import ClientConnection
from pierhead.gateway.seeing import Seeing
from pierhead.gateway.services import Services
from pierhead.gateway.stderr import LogOfStderr
from pierhead.gateway.tls import Certificate
from pierhead.gateway.tokens import check_settings

_SWEEP = 0.5
_SLICE = 1000  # connections looked at before others get a turn


class Inherited(msgspec.Struct, frozen=True):
    """A listening descriptor from a gateway before."""

    fd: int
    address: str


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What ``python -m pierhead.gateway`` reads from stdin.

    ``socket`` is the path of the unix data socket. ``inherit`` replaces both it and ``settings.listen``. ``snapshot``
    is needed to listen beyond loopback, since that takes a key. ``state`` is the folder in which the gateway keeps what
    must outlive it, shared with other gateways of this installation ("": it keeps nothing on disk).
    """

    settings: GatewaySettings = GatewaySettings()
    socket: str = ""
    inherit: tuple[Inherited, ...] = ()
    snapshot: Snapshot | None = None
    state: str = ""


class Gateway:
    """One gateway process; ``run`` returns when it has drained."""

    def __init__(self, config: GatewayConfig, admin: Path) -> None:
        self._config = config
        self._admin_path = admin
        self._listening: list[Listening] = []
        self._admin: Listening | None = None
        self._admin_inode = 0
        self._drained = asyncio.Event()
        self._drain_by = 0.0
        self._reported: tuple[object, ...] = (0, -1, ())  # connections, snapshot version, problems
        settings = config.settings
        self._link = LinkServer(
            self._hello, self._report, lambda: self._listening, self._apply, self.drain, settings.start_timeout
        )
        self._services = Services(
            settings,
            Doorkeeper(settings, [host_of(address) for address in settings.listen]),
            self._link.ensure_ready,
            self._link.poke,
            self._drained.set,
            Budgets(_ledger(config.state), settings.answer_tokens),
            Path(config.state) if config.state else None,
        )
        self._services.progress = self._link.progress
        self._seeing = Seeing(self._services, config.state)
        self._services.tell = self._link.say

        locals_ = Locals(self._services)
        self._certificate = Certificate(settings)
        self._ports = Ports(settings, self._certificate, lambda door: ClientConnection(self._services, locals_, door))
        self._renewing: asyncio.Task[None] | None = None
        self._log = LogOfStderr()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens, ``HOST:PORT`` or ``unix:PATH``."""
        return tuple(item.address for item in self._listening)

    def open(self) -> None:
        """Bind every address; PierError when one is refused, and then nothing stays bound."""
        config, settings = self._config, self._config.settings
        snapshot = config.snapshot
        check_settings(settings)
        self._certificate.load()
        if snapshot is not None:
            self._services.apply(snapshot)
        try:
            if config.inherit:
                self._listening += [inherit(item.fd, item.address) for item in config.inherit]
            else:
                has_keys = bool(settings.oidc_issuer) or (snapshot is not None and bool(snapshot.keys))
                check_exposure(settings.listen, require_key=settings.require_key, has_keys=has_keys)
                self._listening += [bind_tcp(address) for address in settings.listen]
                if config.socket:
                    self._listening.append(bind_unix(Path(config.socket)))
            self._admin = bind_unix(self._admin_path, replace=bool(config.inherit))
            self._admin_inode = self._admin_path.stat().st_ino
        except BaseException:
            for item in self._listening:
                item.sock.close()
            raise

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or a Drain, then finish what runs."""
        assert self._admin is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain, self._config.settings.request_timeout)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        services = self._services
        await self._seeing.open()
        await self._ports.open(self._listening)
        gc.collect()
        gc.freeze()
        link = loop.create_task(self._link.serve(self._admin.sock))
        sweep = loop.create_task(self._sweep())
        probing = loop.create_task(probe(services.routes))
        try:
            await self._drained.wait()
        finally:
            for task in (probing, sweep, link):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await self._services.room.close()
            self._close()
            await self._seeing.close()

    def _hung_up(self) -> None:
        """SIGHUP: logs are opened anew, and the certificate is read again even if its files look the same."""
        self._log.reopen()
        self._seeing.reopen()
        self._renewing = asyncio.get_running_loop().create_task(self._ports.renew(force=True))

    def drain(self, grace: float = 600.0) -> None:
        """Accept nothing new, finish what runs, end after ``grace`` seconds at the latest."""
        services = self._services
        if services.draining:
            self._drain_by = min(self._drain_by, time.monotonic() + grace)
            return
        services.draining = True
        self._drain_by = time.monotonic() + grace
        self._ports.close()
        for item in self._listening:
            item.sock.close()
        if not services.connections:
            self._drained.set()

    async def _sweep(self) -> None:
        """Deadlines, idle upstream connections, reports and the end of a drain, twice a second."""
        services = self._services
        while True:
            await asyncio.sleep(_SWEEP)
            services.now = now = time.monotonic()
            for count, connection in enumerate(list(services.connections), 1):
                connection.sweep(now)
                if count % _SLICE == 0:
                    await asyncio.sleep(0)
            services.sweep(now)
            await self._ports.renew()
            services.lag.watch()
            self._link.send_report()
            if services.draining and now > self._drain_by:
                for connection in list(services.connections):
                    connection.abort()
                self._drained.set()

    def _close(self) -> None:
        assert self._admin is not None
        with contextlib.suppress(OSError):
            # After a hand-over the path belongs to the next gateway; a socket file of ours has our inode only.
            if os.stat(self._admin_path).st_ino == self._admin_inode:
                self._admin_path.unlink()
        self._admin.sock.close()
        self._services.answers.close()

    # --- the link -------------------------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(version=pierhead.__version__, pid=os.getpid(), listeners=self.addresses)

    def _apply(self, snapshot: Snapshot) -> None:
        self._services.apply(snapshot)
        self._link.poke()

    def _report(self) -> Report | None:
        activity = self._services.routes.activity()
        count = len(self._services.connections)
        version = self._services.routes.version
        problems = (self._certificate.problem,) if self._certificate.problem else ()
        if not activity and (count, version, problems) == self._reported:
            return None
        self._reported = (count, version, problems)
        return Report(connections=count, snapshot=version, activity=activity, problems=problems)


def _ledger(state: str) -> Ledger:
    return SqliteLedger(Path(state) / "budgets.db") if state else MemoryLedger()
