"""Where a program listens, and how it says that it does."""

from __future__ import annotations

import contextlib
import os
import socket


def listen(place: str) -> socket.socket:
    """A unix socket, or ``address:port`` where a socket file cannot reach whoever asks."""
    if place.startswith("/"):
        made = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place)
        made.bind(place)
    else:
        host, _, port = place.rpartition(":")
        made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host.strip("[]"), int(port)))
    made.listen(2048)
    return made


def notify(place: str) -> None:
    """Tell whoever started this that the model is loaded and the socket listens (as systemd's services do)."""
    if not place.startswith("/"):
        return  # nobody can be told
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
        out.sendto(b"READY=1", os.path.join(os.path.dirname(place), "notify.sock"))
