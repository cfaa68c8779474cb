"""Opening unix sockets that an untrusted engine may have replaced; not a client of any protocol.

A replica's socket lives in a folder the engine can write. It may swap its socket for a link to somebody else's, so
the path is never handed to ``connect`` itself: it is pinned with ``O_PATH|O_NOFOLLOW``, checked to be a socket, and
connected to through ``/proc/self/fd``, which names exactly the inode that was checked.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Generator


def pin(path: str | os.PathLike[str]) -> int:
    """Open ``path`` without following a link and return the descriptor (the caller closes it).

    Raises FileNotFoundError when nothing is there and ConnectionRefusedError when it is anything but a socket.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError as exc:
        raise FileNotFoundError(str(path)) from exc
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConnectionRefusedError(f"{path} is not a socket")
    return fd


@contextlib.contextmanager
def open_unix(path: str | os.PathLike[str]) -> Generator[str, None, None]:
    """The address to connect to instead of ``path``, valid inside the ``with``; raises what ``pin`` raises."""
    fd = pin(path)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def tcp_address(address: str) -> tuple[str, int] | None:
    """Host and port of ``tcp://host:port``; None for the path of a unix socket."""
    if not address.startswith("tcp://"):
        return None
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def connect_unix(path: str | os.PathLike[str], timeout: float | None = None) -> socket.socket:
    """A blocking stream connection to the socket at ``path``; raises what ``pin`` and ``connect`` raise."""
    with open_unix(path) as address:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock
