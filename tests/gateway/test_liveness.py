"""A client that only finished sending is told from one that has gone, over unix sockets, loopback and elsewhere."""

from __future__ import annotations

import asyncio
import socket
import struct
import time

import pytest

from pierhead.config import GatewaySettings
from pierhead.gateway import link, liveness
from pierhead.gateway.admission import Door, Doorkeeper
from pierhead.gateway.faults import Fault
from pierhead.gateway.local import Locals
from pierhead.gateway.protocol import ClientConnection
from pierhead.gateway.services import Services


class Holder:
    """A transport of which only the socket matters."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def get_extra_info(self, name):
        return self.sock


@pytest.mark.parametrize(
    ("how", "expected"), [("open", "open"), ("half", "reads"), ("close", "gone"), ("reset", "gone")]
)
@pytest.mark.parametrize("family", ["tcp", "tcp6", "unix"])
def test_the_kernel_knows_what_became_of_a_client_on_this_host(family, how, expected, tmp_path):
    if family == "unix":
        server, client = socket.socketpair()
    else:
        host = "::1" if family == "tcp6" else "127.0.0.1"
        try:
            listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError:
            pytest.skip("no IPv6 here")
        client = socket.create_connection(listener.getsockname()[:2])
        server, _ = listener.accept()
        listener.close()
    if how == "half":
        client.shutdown(socket.SHUT_WR)
    elif how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how in ("close", "reset"):
        client.close()
    assert liveness.peer_state(Holder(server)) == expected
    server.close()
    client.close()


async def test_a_far_client_that_left_a_silent_stream_is_found_by_a_comment_in_it(new_engine, http, chat, monkeypatch):
    async def answer(call):
        await call.sse()
        await call.event({"n": 1})
        await call.reader.read()  # says nothing more

    async def no_daemon(model, failed):
        raise Fault(503, "daemon_unavailable", "nobody")

    monkeypatch.setattr(liveness, "_held_here", lambda sock: None)  # as for a client of another machine
    engine = await new_engine(answer)
    config = GatewaySettings()
    services = Services(config, Doorkeeper(config), no_daemon, lambda: None, lambda: None)
    services.apply(link.Snapshot(version=1, routes=(link.Route(name="m", endpoints=(engine.endpoint,)),)))
    door = Door("", True, False)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: ClientConnection(services, Locals(services), door), "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    try:
        for leaves in (False, True):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(http("POST", "/v1/chat/completions", chat | {"stream": True}))
            await reader.readuntil(b'data: {"n": 1}\n\n')
            if leaves:
                writer.close()
            else:
                writer.write_eof()
            async with asyncio.timeout(10):
                while services.connections:
                    for connection in list(services.connections):
                        connection.sweep(time.monotonic())
                    if not leaves:
                        break
                    await asyncio.sleep(0.01)
            if not leaves:
                async with asyncio.timeout(10):
                    assert b":\n\n" in await reader.readuntil(b":\n\n")
                writer.transport.abort()
        async with asyncio.timeout(10):
            while services.metrics.relays:
                for connection in list(services.connections):
                    connection.sweep(time.monotonic())
                await asyncio.sleep(0.01)
    finally:
        server.close()
