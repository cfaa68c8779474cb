"""The addresses a gateway listens on: parse, refuse, bind, inherit; accepts no connection."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from pierhead.errors import AccessDenied, AddressInUse, ConfigError
from pierhead.gateway.admission import Door

BRIDGE = "docker0"
# Connections inherit these: a client whose machine vanished is noticed within a minute, also while it only waits.
_KEEP_ALIVE = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 30),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 10),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 3),
    ((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT), 60_000),
)
BACKLOG = 4096  # connections that wait to be accepted; the kernel may allow fewer


@dataclass(frozen=True)
class Listening:
    """A bound, listening socket and what its address demands; ``address`` is ``HOST:PORT`` or ``unix:PATH``."""

    sock: socket.socket
    address: str
    loopback: bool

    @property
    def tcp(self) -> bool:
        """Whether clients come over TCP."""
        return self.sock.family != socket.AF_UNIX


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` with an IP literal, ``localhost``, ``*`` or ``docker`` (the Docker bridge) as the host."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if host == "localhost":
        host = "127.0.0.1"
    elif host in ("", "*"):
        host = "0.0.0.0"  # noqa: S104  # asked for by name, and refused without keys
    elif host == "docker":
        host = bridge_address()
    try:
        ip_address(host)
        number = int(port)
        if not colon or not 0 <= number < 65536:
            raise ValueError
    except ValueError as exc:
        raise ConfigError(
            f"'{text}' is not an address to listen on",
            hint="Write HOST:PORT with an IP address, such as 127.0.0.1:12434, or docker:12434 for the Docker bridge.",
        ) from exc
    return host, number


def bridge_address(interface: str = BRIDGE) -> str:
    """The IPv4 address of the Docker bridge, where containers find ``host.docker.internal``."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            return socket.inet_ntoa(fcntl.ioctl(sock.fileno(), 0x8915, request)[20:24])  # SIOCGIFADDR
        except OSError as exc:
            raise ConfigError(
                f"there is no Docker bridge ({interface}) on this machine",
                hint="Start Docker first, or listen on another address.",
            ) from exc


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    return ip_address(host.partition("%")[0]).is_loopback


def check_exposure(addresses: Iterable[str], *, require_key: bool, has_keys: bool) -> None:
    """AccessDenied when an address is reachable from other machines and no key protects it."""
    for text in addresses:
        if not is_loopback(parse_address(text)[0]) and not require_key and not has_keys:
            raise AccessDenied(
                f"will not listen on {text}: other machines reach it and there is no API key",
                hint="Make a key first: pier key create NAME",
            )


def bind_tcp(text: str) -> Listening:
    """Listen on ``HOST:PORT``; AddressInUse when another program does."""
    host, port = parse_address(text)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for option, value in _KEEP_ALIVE:
            sock.setsockopt(*option, value)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise _bind_error(text, exc) from exc
    return Listening(sock, _name(sock), is_loopback(host))


def bind_unix(path: Path, *, replace: bool = False) -> Listening:
    """Listen on ``path``, mode 0600; a dead socket there goes, a live one only with ``replace``."""
    if not replace and _alive(path):
        raise AddressInUse(f"another gateway listens on {path}", hint="Stop it with: pier stop --all")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.unlink(missing_ok=True)
        sock.bind(str(fresh))
        fresh.chmod(0o600)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        fresh.rename(path)
    except OSError as exc:
        sock.close()
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise _bind_error(str(path), exc) from exc
    return Listening(sock, f"unix:{path}", True)


def inherit(fd: int, address: str) -> Listening:
    """Go on listening on a descriptor that another gateway opened."""
    try:
        sock = socket.socket(fileno=fd)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.EINVAL, "it does not listen")
    except OSError as exc:
        raise ConfigError(f"descriptor {fd} for {address} is not a listening socket: {exc}") from exc
    sock.setblocking(False)
    unix = sock.family == socket.AF_UNIX
    return Listening(sock, address if unix else _name(sock), unix or is_loopback(sock.getsockname()[0]))


def doors(listening: Iterable[Listening], *, require_key: bool) -> list[tuple[Listening, Door]]:
    """Each listener with what it demands: keys on all of TCP once any of it reaches beyond this machine."""
    listening = list(listening)
    key = require_key or any(item.tcp and not item.loopback for item in listening)
    return [(item, Door(item.address, item.tcp, key and item.tcp)) for item in listening]


def _name(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _alive(path: Path) -> bool:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} exists and is no socket", hint=f"Move {path} away.")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(1)
            sock.connect(str(path))
            return True
    except OSError:
        return False


def _bind_error(where: str, exc: OSError) -> AddressInUse | AccessDenied | ConfigError:
    if exc.errno == errno.EADDRINUSE:
        return AddressInUse(
            f"cannot listen on {where}: another program does",
            hint="Stop it, or choose another address: `pier serve --listen ADDRESS`, or PIERHEAD_GATEWAY__LISTEN.",
        )
    if exc.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(f"cannot listen on {where}: no permission", hint="Choose a port above 1023.")
    return ConfigError(f"cannot listen on {where}: {exc.strerror}", hint="Choose another address with --listen.")
