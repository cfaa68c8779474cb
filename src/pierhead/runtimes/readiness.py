"""When an engine answers: it says so on a datagram socket, then one health request confirms it; no polling."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from pierhead.engines.base import LaunchSpec, Readiness
from pierhead.errors import EngineFailed, Timeout
from pierhead.runtimes.base import Exit, Instance
from pierhead.sockets import connect_unix, tcp_address

LOG_LINES = 20


class Notify:
    """The receiving end of ``READY=1``, bound beside the engine's socket before the engine starts."""

    def __init__(self, folder: Path) -> None:
        path = folder / "notify.sock"
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.bind(str(path))
        os.chmod(path, 0o666)  # noqa: S103  # the folder itself is private to the engine and us

    async def received(self) -> None:
        """Return when the engine said that it is ready."""
        loop = asyncio.get_running_loop()
        while b"READY=1" not in await loop.sock_recv(self._socket, 4096):
            pass

    def close(self) -> None:
        self._socket.close()


async def wait_ready(instance: Instance, readiness: Readiness | None = None, *, timeout: float | None = None) -> None:
    """Return when the engine answers its readiness path with 200.

    Raises EngineFailed, with the engine's last log lines, when it ends before; Timeout after ``timeout`` seconds.
    """
    wanted = readiness or instance.spec.readiness
    limit = wanted.timeout if timeout is None else timeout
    ended = asyncio.ensure_future(instance.wait())
    ready = asyncio.ensure_future(_ready(instance, wanted.path))
    try:
        async with asyncio.timeout(limit):
            await asyncio.wait((ended, ready), return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and not ready.cancelled():
            ready.result()
            return
        raise await failure(instance, ended.result())
    except TimeoutError as exc:
        raise Timeout(
            f"'{instance.spec.model}' was not ready after {limit:g} s",
            hint=f"See `pier logs {instance.spec.model}`; [fleet] start_timeout allows more.",
            data={"log": await last_lines(instance)},
        ) from exc
    finally:
        for task in (ended, ready):
            task.cancel()
        await asyncio.gather(ended, ready, return_exceptions=True)


async def _ready(instance: Instance, path: str) -> None:
    notify: Notify | None = getattr(instance, "notify", None)
    pause = 0.0
    if notify is None:  # taken over from another daemon: nobody will tell us, so ask, less and less often
        pause = 0.02
    elif not await healthy(instance.socket, path):
        await notify.received()
    while not await healthy(instance.socket, path):
        await asyncio.sleep(pause or 0.002)
        pause = min(pause * 1.5, 0.5)


async def healthy(path: str, target: str = "/health", timeout: float = 5.0, method: str = "GET") -> bool:
    """Whether the engine behind the socket (or ``tcp://host:port``) answers ``target`` with 200 now."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await _connect(path)
            writer.write(
                f"{method} {target} HTTP/1.1\r\nHost: engine\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
            )
            line = await reader.readline()
            return line.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200"))
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    place = tcp_address(address)
    if place is not None:
        return await asyncio.open_connection(*place)
    sock = connect_unix(address, 1.0)
    try:
        sock.setblocking(False)
        return await asyncio.open_unix_connection(sock=sock)
    except BaseException:
        sock.close()
        raise


async def last_lines(instance: Instance) -> list[str]:
    """The engine's last log lines, each cut to 500 characters."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        async for line in instance.logs(tail=LOG_LINES):
            found.append(line.decode("utf-8", "replace").rstrip()[:500])
    return found[-LOG_LINES:]


async def failure(instance: Instance, exit: Exit) -> EngineFailed:
    """Why an engine ended, in plain words, with its last log lines."""
    lines = await last_lines(instance)
    spec: LaunchSpec = instance.spec
    said = next((x for x in reversed(lines) if x.startswith("engine:") or " E " in x or "error" in x.lower()), "")
    how = "was killed for memory" if exit.oom else f"was killed by signal {exit.signal}" if exit.signal else ""
    how = how or exit.reason or f"ended with status {exit.code}"
    return EngineFailed(
        f"the engine of '{spec.model}' {how}" + (f": {said}" if said else ""),
        hint="Try a smaller --context or stop another model." if exit.oom else f"See `pier logs {spec.model}`.",
        data={"log": lines, "exit": {"code": exit.code, "signal": exit.signal, "oom": exit.oom}},
    )
