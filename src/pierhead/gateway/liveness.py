"""Tells a client that has gone from one that only finished sending, without reading from it.

A unix socket knows a closed peer from a half-closed one. TCP does not until something is sent: an interim answer is
something that a client which still reads ignores, and that one which is gone answers with a reset, seen here next time.
"""

from __future__ import annotations

import asyncio
import select
import socket
from typing import Literal, cast


def peer_state(transport: asyncio.Transport) -> Literal["open", "unsure", "gone"]:
    """``unsure`` when the peer sends no more, and may still read."""
    sock = cast("socket.socket | None", transport.get_extra_info("socket"))
    if sock is None or sock.fileno() < 0:
        return "gone"
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    events = poll.poll(0)
    if not events:
        return "open"
    return "gone" if events[0][1] & (select.POLLHUP | select.POLLERR) else "unsure"
