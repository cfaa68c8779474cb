"""The daemon as a process: one per installation, its socket, its log, its place in the background."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import socket
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pierhead.errors import AccessDenied, Conflict, PierError
from pierhead.paths import Paths

LOG_BYTES = 5 * 1024 * 1024
LOG_KEPT = 2


class AlreadyRunning(Conflict):
    """Another daemon of this installation runs, and listens."""

    code = "already_running"


@dataclass
class Held:
    """What makes this process the daemon: the lock it holds until it ends, and the listening control socket."""

    lock: int
    socket: socket.socket
    path: Path

    def release(self) -> None:
        """Stop listening and let the next daemon in."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self.socket.close()
        os.close(self.lock)


def make_folders(paths: Paths) -> None:
    """Create the folders, for us alone; AccessDenied when the runtime folder belongs to somebody else."""
    for folder in (paths.state, paths.cache, paths.runtime, paths.replicas):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise AccessDenied(
                f"cannot make the folder {folder}: {exc.strerror}",
                hint="Set PIERHEAD_HOME to a folder that you can write to.",
            ) from exc
    found = paths.runtime.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise AccessDenied(
            f"the folder {paths.runtime} belongs to another user",
            hint="Remove it, or set PIERHEAD_HOME to a folder of your own.",
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        paths.runtime.chmod(0o700)


def become_daemon(paths: Paths) -> Held:
    """Take the lock and listen on the control socket; AlreadyRunning when another one does.

    Whoever finds the lock held can connect at once: the lock and the socket are taken under a second lock, so there
    is no moment in which a daemon runs and does not listen.
    """
    make_folders(paths)
    gate = os.open(paths.runtime / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        lock = os.open(paths.runtime / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Held(lock, _listen(paths.control_socket), paths.control_socket)
        except BlockingIOError as exc:
            os.close(lock)
            raise AlreadyRunning(
                "a daemon runs already", hint="`pier status` shows it; `pier stop --all --daemon` ends it."
            ) from exc
        except BaseException:
            os.close(lock)
            raise
    finally:
        os.close(gate)


def _listen(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(128)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class Announcer:
    """Tells whoever started us, once, how the start went: one JSON line on a pipe."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def ready(self, facts: dict[str, Any]) -> None:
        self._say(facts)

    def failed(self, error: PierError) -> None:
        self._say({"error": error.to_dict()})

    def _say(self, facts: dict[str, Any]) -> None:
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):
            os.write(fd, json.dumps(facts).encode() + b"\n")
        os.close(fd)


def go_background(paths: Paths, ready_fd: int | None, report: Callable[[dict[str, Any]], int]) -> int:
    """Fork; the child goes on in a session of its own and gets the pipe to announce itself on.

    The parent never returns: it leaves at once when ``ready_fd`` says that somebody else waits for the announcement;
    else it waits itself and leaves with what ``report`` makes of it ({} when the child died).
    """
    read, write = (-1, ready_fd) if ready_fd is not None else os.pipe()
    if os.fork() > 0:
        os.close(write)
        os._exit(0 if read < 0 else report(_read_announcement(read)))
    if read >= 0:
        os.close(read)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(paths.daemon_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(null)
    os.close(log)
    os.set_inheritable(write, False)
    return write


def _read_announcement(fd: int) -> dict[str, Any]:
    data = b""
    while b"\n" not in data and select.select([fd], [], [], 60)[0]:
        chunk = os.read(fd, 65536)
        if not chunk:
            break
        data += chunk
    return json.loads(data) if data.endswith(b"\n") else {}


def reopen_logs() -> None:
    """Go on in files of the same names: those that were there have been moved away."""
    for handler in logging.getLogger("pierhead").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.acquire()
            try:
                handler.close()
                handler.stream = handler._open()  # pyright: ignore[reportPrivateUsage] - as WatchedFileHandler does
            finally:
                handler.release()


def set_up_logging(paths: Paths, level: str, *, background: bool) -> None:
    """Log to the terminal, or in the background to ``daemon.log``, which is rotated by size."""
    from logging.handlers import RotatingFileHandler

    handler: logging.Handler
    if background:
        handler = RotatingFileHandler(paths.daemon_log, maxBytes=LOG_BYTES, backupCount=LOG_KEPT, encoding="utf-8")
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("pierhead")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
