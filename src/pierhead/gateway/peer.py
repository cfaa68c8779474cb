"""Whose process is at the other end of a loopback connection, by the kernel's table of sockets.

The parser is pure. A connection whose program has closed it shows root as its owner and no inode: it is nobody's.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

from pierhead.gateway.faults import Fault

_LIVE = frozenset({"01", "04", "05", "08"})  # established, or closed for writing by one side
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
Address = tuple[str, int]


def owner(table: str, local: Address, remote: Address) -> int | None:
    """The uid of the socket with these two ends in a table of ``/proc/net``; None where no program holds it."""
    ends = {_hex(local, wide) + " " + _hex(remote, wide) for wide in (False, True)} - {" "}
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 10 or f"{fields[1]} {fields[2]}" not in ends or fields[3] not in _LIVE or fields[9] == "0":
            continue
        return int(fields[7]) if fields[7].isdigit() else None
    return None


def _hex(address: Address, wide: bool) -> str:
    """An address as the table has it: words of the machine's byte order; ``wide`` is that of IPv6."""
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    if ip.version == 6 and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.version == 6 and not wide:
        return ""
    packed = ip.packed if ip.version == 6 or not wide else b"\0" * 10 + b"\xff\xff" + ip.packed
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    text = "".join(f"{socket.ntohl(int.from_bytes(word, 'big')):08X}" for word in words)
    return f"{text}:{address[1]:04X}"


def may_change(own: Address, peer: Address, *, uids: frozenset[int] | None = None) -> None:
    """Fault 401 unless the client is on this machine and runs as our own user, or root. Blocks on ``/proc``."""
    allowed = uids if uids is not None else frozenset({0, os.getuid()})
    if ipaddress.ip_address(peer[0].partition("%")[0]).is_loopback:
        for path in _TABLES:
            try:
                found = owner(path.read_text(), peer, own)
            except OSError:
                continue
            if found is not None and found in allowed:
                return
    raise refused()


def refused() -> Fault:
    """Whoever it is, it is not known to be our own user."""
    return Fault(
        401,
        "missing_api_key",
        "changing the models of this host without a key is for programs of its own user.",
        hint="Send 'Authorization: Bearer KEY' with an admin key; make one with: pier key create NAME --admin",
        headers=((b"www-authenticate", b'Bearer realm="pierhead"'),),
    )
