"""Starting a gateway process, which outlives the daemon, and finding one that runs; speaks no link messages."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pierhead import __version__
from pierhead.config import GatewaySettings
from pierhead.errors import AddressInUse, PierError, RuntimeUnavailable, from_dict
from pierhead.gateway.link import Snapshot
from pierhead.paths import Paths

START_TIMEOUT = 20.0


@dataclass
class Spawned:
    """A gateway that was started; ``output`` is where it says that it listens, ``log_from`` where its log begins."""

    process: subprocess.Popen[bytes]
    output: int
    log_from: int


def fingerprint(settings: GatewaySettings) -> str:
    """Two gateways with the same fingerprint behave alike."""
    return hashlib.sha256(__version__.encode() + msgspec.json.encode(settings)).hexdigest()


def connect(paths: Paths) -> socket.socket | None:
    """A non-blocking connection to the gateway that runs; None when none does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(paths.gateway_admin_socket))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    sock.setblocking(False)
    return sock


def spawn(
    paths: Paths, settings: GatewaySettings, snapshot: Snapshot | None, inherit: Sequence[tuple[int, str]] = ()
) -> Spawned:
    """Start ``python -m pierhead.gateway`` in a session of its own; ``inherit`` are listening sockets to take over."""
    config: dict[str, Any] = {
        "settings": settings,
        "socket": str(paths.gateway_socket),
        "inherit": [{"fd": fd, "address": address} for fd, address in inherit],
        "snapshot": snapshot,
        "state": str(_state(paths)),
    }
    log_file = paths.state / "gateway.log"
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    read, write = os.pipe()
    try:
        if os.fstat(log).st_size > 10 * 1024 * 1024:
            os.ftruncate(log, 0)
        start = os.fstat(log).st_size
        process = subprocess.Popen(
            [sys.executable, "-m", "pierhead.gateway", "--admin", str(paths.gateway_admin_socket)],
            stdin=subprocess.PIPE,
            stdout=write,
            stderr=log,
            pass_fds=[fd for fd, _ in inherit],
            start_new_session=True,
            cwd="/",
        )
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
        os.close(log)
    _notes(paths).mkdir(mode=0o700, exist_ok=True)
    (_notes(paths) / str(process.pid)).write_text(f"{_birth(process.pid)} {fingerprint(settings)}")
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(msgspec.json.encode(config))
        process.stdin.close()
    return Spawned(process, read, start)


def runs_alike(paths: Paths, settings: GatewaySettings, pid: int) -> bool:
    """Whether the gateway ``pid`` was started with these settings by this version."""
    note = _notes(paths) / str(pid)
    with contextlib.suppress(OSError):
        return note.read_text() == f"{_birth(pid)} {fingerprint(settings)}"
    return False


def retire_strays(paths: Paths, keep: int = 0) -> None:
    """Let every gateway but ``keep`` drain and end: a daemon that was killed in the middle of a change leaves some."""
    with contextlib.suppress(FileNotFoundError):
        for note in _notes(paths).iterdir():
            pid = int(note.name)
            if pid == keep:
                continue
            with contextlib.suppress(OSError):
                birth, _, _ = note.read_text().partition(" ")
                if birth and birth == _birth(pid):
                    os.kill(pid, signal.SIGTERM)
                note.unlink()


def forget(paths: Paths) -> None:
    """Nothing is to go on: let what is left of gateways end, and remove the socket, which the next one binds anew."""
    retire_strays(paths)
    paths.gateway_socket.unlink(missing_ok=True)


def _state(paths: Paths) -> Path:
    """Where gateways keep what must outlive them."""
    folder = paths.state / "gateway"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _notes(paths: Paths) -> Path:
    """One file per gateway that was started, named by its pid: when it was born and its fingerprint."""
    return paths.runtime / "gateways"


def _birth(pid: int) -> str:
    """When a process started, in ticks since boot; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


async def listening(paths: Paths, spawned: Spawned) -> None:
    """Return once the gateway listens; raise the error that it ended with (AddressInUse and such)."""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            line = await _read_line(spawned.output)
    except TimeoutError as exc:
        spawned.process.kill()
        raise RuntimeUnavailable("the gateway did not start in time", hint=f"See {paths.state}/gateway.log.") from exc
    finally:
        os.close(spawned.output)
    if not line:
        await asyncio.to_thread(spawned.process.wait, 10)
        raise _why(paths.state / "gateway.log", spawned.log_from)


async def _read_line(fd: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while not data.endswith(b"\n"):
        readable = asyncio.Event()
        loop.add_reader(fd, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(fd)
        chunk = os.read(fd, 65536)
        if not chunk:
            return b""
        data += chunk
    return data


def _why(log_file: Path, start: int) -> PierError:
    with log_file.open("rb") as file:
        file.seek(start)
        lines = file.read(1 << 20).decode("utf-8", "replace").strip().splitlines()
    with contextlib.suppress(IndexError, ValueError, KeyError, TypeError):
        error = from_dict(json.loads(lines[-1])["error"])
        if isinstance(error, AddressInUse) and "--listen" not in (error.hint or ""):
            error.hint = f"{error.hint or ''} Or choose another address: `pier serve --listen 127.0.0.1:0`.".strip()
        return error
    return RuntimeUnavailable("the gateway ended while it was starting", hint=f"See {log_file}.", data={"log": lines})
