"""The listening sockets at work: accepts connections, in TLS where a certificate is for it; binds none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from pierhead.config import GatewaySettings
from pierhead.gateway.admission import Door
from pierhead.gateway.listeners import BACKLOG, Listening, doors
from pierhead.gateway.tls import Certificate

_SHUTDOWN = 2.0  # seconds that a client gets to answer the end of its TLS connection


class Ports:
    """Serves ``connect(door)`` on every listener until ``close``; connections live on when the certificate changes."""

    def __init__(self, settings: GatewaySettings, certificate: Certificate, connect: Callable[[Door], Any]) -> None:
        self._settings = settings
        self._certificate = certificate
        self._connect = connect
        self._open: list[tuple[Listening, Door, asyncio.Server]] = []

    async def open(self, listening: Sequence[Listening]) -> None:
        """Accept connections."""
        settings = self._settings
        for item, door in doors(listening, require_key=settings.require_key):
            tls = item.tcp and bool(settings.tls_cert) and (settings.tls_loopback or not item.loopback)
            door = door._replace(tls=tls)
            self._open.append((item, door, await self._serve(item, door)))

    async def _serve(self, item: Listening, door: Door) -> asyncio.Server:
        loop, sock = asyncio.get_running_loop(), item.sock.dup()
        if not item.tcp:
            return await loop.create_unix_server(lambda: self._connect(door), sock=sock, backlog=BACKLOG)
        if not door.tls:
            return await loop.create_server(lambda: self._connect(door), sock=sock, backlog=BACKLOG)
        return await loop.create_server(
            lambda: self._connect(door),
            sock=sock,
            backlog=BACKLOG,
            ssl=self._certificate.context,
            ssl_handshake_timeout=self._settings.header_timeout,
            ssl_shutdown_timeout=_SHUTDOWN,
        )

    async def renew(self, *, force: bool = False) -> None:
        """Meet new connections with a certificate that has changed."""
        if not self._settings.tls_cert or not await asyncio.to_thread(lambda: self._certificate.renew(force=force)):
            return
        for item, door, server in [port for port in self._open if port[1].tls]:
            renewed = await self._serve(item, door)  # accepts before the other one stops, so nobody is turned away
            if (item, door, server) in self._open:
                self._open[self._open.index((item, door, server))] = item, door, renewed
                server.close()
            else:  # closed meanwhile
                renewed.close()

    def close(self) -> None:
        """Accept nothing more."""
        for _, _, server in self._open:
            server.close()
        self._open.clear()
