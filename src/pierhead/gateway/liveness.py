"""Tells a client that has gone from one that only finished sending, without reading from it.

A unix socket knows a closed peer from a half-closed one. TCP does not until something is sent. For a client on this
host the kernel can be asked whether a process still holds the other end; for others it stays unsure, and the caller may
send something that a client which still reads ignores, and that one which is gone answers with a reset.
"""

from __future__ import annotations

import select
import socket
import struct
from asyncio import Transport
from ipaddress import ip_address
from typing import Literal, cast

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY = 20
_ERROR = 2
_ENOENT = -2
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_ENDS = struct.Struct("!HH16s16s")
_REST = struct.Struct("=III")  # any interface, no cookie
_INODE_AT = _HEADER.size + 4 + _ENDS.size + _REST.size + 16


def peer_state(transport: Transport) -> Literal["open", "reads", "unsure", "gone"]:
    """``reads``: it sends no more and is there; ``unsure``: it sends no more and may be gone."""
    sock = cast("socket.socket | None", transport.get_extra_info("socket"))
    if sock is None or sock.fileno() < 0:
        return "gone"
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    events = poll.poll(0)
    if not events:
        return "open"
    if events[0][1] & (select.POLLHUP | select.POLLERR):
        return "gone"
    if sock.family == socket.AF_UNIX:
        return "reads"
    held = _held_here(sock)
    return "unsure" if held is None else "reads" if held else "gone"


def _held_here(sock: socket.socket) -> bool | None:
    """Whether a process of this host holds the other end of ``sock``; None when that cannot be told."""
    try:
        mine, theirs = sock.getsockname(), sock.getpeername()
        found = _inode(sock.family, theirs[:2], mine[:2])
    except OSError:
        return None
    if found is None:  # nothing here: gone, or a client elsewhere
        return False if ip_address(str(theirs[0]).partition("%")[0]).is_loopback else None
    return found > 0


def _inode(family: int, source: tuple[str, int], to: tuple[str, int]) -> int | None:
    """The inode of the TCP socket ``source`` → ``to``, 0 when nobody holds it any more, None when there is none."""
    ends = _ENDS.pack(source[1], to[1], *(socket.inet_pton(family, end[0].partition("%")[0]) for end in (source, to)))
    ask = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + ends + _REST.pack(0, 0xFFFFFFFF, 0xFFFFFFFF)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        diag.setblocking(False)
        diag.send(_HEADER.pack(_HEADER.size + len(ask), _BY_FAMILY, 1, 1, 0) + ask)
        data = diag.recv(8192)
    if _HEADER.unpack_from(data)[1] != _ERROR:
        return int(struct.unpack_from("=I", data, _INODE_AT)[0])
    code = int(struct.unpack_from("=i", data, _HEADER.size)[0])
    if code != _ENOENT:
        raise OSError(-code, "the kernel does not tell about sockets")
    return None
