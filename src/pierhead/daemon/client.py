"""The control API's client: blocking JSON over the unix socket, quick to import; not the OpenAI client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlencode

from pierhead import __version__
from pierhead.errors import DaemonUnavailable, PierError, from_dict
from pierhead.paths import Paths

if TYPE_CHECKING:
    from pierhead.events import AnyEvent

START_TIMEOUT = 30.0
_MAX_LINE = 16 * 1024 * 1024


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


class Client:
    """Talks to the daemon of one installation; safe to share between threads (each call has its connection)."""

    def __init__(self, paths: Paths, *, timeout: float = 60.0) -> None:
        self.paths = paths
        self.timeout = timeout

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """The decoded JSON answer (None when empty); raises the PierError that the daemon sent.

        ``path`` may leave out ``/api/v1``. Raises DaemonUnavailable when no daemon answers.
        """
        with self._open(method, path, body, query, self.timeout if timeout is None else timeout) as response:
            data = response.read()
        return json.loads(data) if data else None

    def stream(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The objects of an NDJSON answer as they come; ``timeout`` seconds without a line end it (None: wait)."""
        for line in self.lines(method, path, body, query=query, timeout=timeout):
            yield json.loads(line)

    def events(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> Iterator[AnyEvent]:
        """The typed events of an NDJSON answer; a ``failed`` event is raised as its error.

        Raises DaemonUnavailable when the stream ends before its last event.
        """
        from pierhead.events import Failed, PullDone, Ready, decode  # a third of this module's import time

        last: AnyEvent | None = None
        for line in self.lines(method, path, body, timeout=timeout):
            last = decode(line)
            if isinstance(last, Failed):
                raise from_dict(last.error)
            yield last
        if not isinstance(last, (Ready, PullDone)):
            raise DaemonUnavailable(
                "the daemon ended before the work was done", hint=f"See {self.paths.daemon_log}, then try again."
            )

    def lines(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Iterator[bytes]:
        """The non-empty lines of a streamed answer without their line ends."""
        with self._open(method, path, body, query, timeout) as response:
            while line := response.readline(_MAX_LINE):
                if text := line.rstrip(b"\r\n"):
                    yield text

    def get(self, path: str, **query: Any) -> Any:
        """``request("GET", …)``."""
        return self.request("GET", path, query=query or None)

    def wait_ready(self, timeout: float = START_TIMEOUT) -> dict[str, Any]:
        """Wait until a daemon that somebody else starts answers; its ``/version``.

        Raises DaemonUnavailable after ``timeout`` seconds.
        """
        from pierhead.daemon.watch import watched

        folder = self.paths.runtime
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found: dict[str, Any] | None = None

        def answers() -> bool:
            nonlocal found
            found = self.version()
            return found is not None

        with watched(folder) as watch:
            watch.wait(answers, timeout)
        if found is None:
            raise DaemonUnavailable(f"no daemon answered within {timeout:g} s", hint=f"See {self.paths.daemon_log}.")
        return found

    def version(self) -> dict[str, Any] | None:
        """What ``GET /version`` says, or None when no daemon answers."""
        try:
            return cast("dict[str, Any]", self.request("GET", "/version", timeout=START_TIMEOUT))
        except DaemonUnavailable:
            return None

    def ensure_daemon(self, start: bool = True, *, args: tuple[str, ...] = ()) -> dict[str, Any]:
        """Make sure that a daemon of this version answers and return its ``/version``.

        Starts one in the background when none runs (unless ``start`` is False), with ``args`` added, and replaces an
        older one without dropping its streams. Raises DaemonUnavailable for a newer one, and whatever kept it from
        starting.
        """
        for _ in range(3):
            info = self.version()
            if info is None:
                if not start:
                    raise DaemonUnavailable("no daemon is running", hint="Start one with `pier serve`.")
                spawn(self.paths, args)
                continue
            order = _compare(str(info.get("version", "")), __version__)
            if order == 0:
                return info
            if order > 0:
                raise DaemonUnavailable(
                    f"the running daemon is version {info['version']}, newer than this pier ({__version__})",
                    hint="Use the pier of that version, or stop the daemon with it (`pier stop --all --daemon`) first.",
                    data={"daemon": info["version"], "client": __version__},
                )
            if not start:
                return info
            self._retire(int(info["pid"]))
        raise DaemonUnavailable("the daemon did not stay up", hint=f"See {self.paths.daemon_log}.")

    def shutdown(self, mode: str = "stop", *, timeout: float = 120.0) -> None:
        """End the daemon and return once it is gone; ``handover`` leaves replicas and gateway running."""
        info = self.version()
        if info is not None:
            self._retire(int(info["pid"]), mode, timeout)

    def _retire(self, pid: int, mode: str = "handover", timeout: float = 60.0) -> None:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            with contextlib.suppress(DaemonUnavailable):
                self.request("POST", "/shutdown", {"mode": mode})
            if not select.select([fd], [], [], timeout)[0]:
                raise DaemonUnavailable(f"the daemon (pid {pid}) did not end within {timeout:g} s", hint=f"kill {pid}")
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _open(
        self, method: str, path: str, body: Any, query: Mapping[str, Any] | None, timeout: float | None
    ) -> Generator[http.client.HTTPResponse]:
        connection = _Connection(str(self.paths.control_socket), timeout)
        try:
            yield self._exchange(connection, method, _target(path, query), body)
        except TimeoutError as exc:
            raise DaemonUnavailable(
                f"the daemon did not answer within {timeout:g} s", hint=f"See {self.paths.daemon_log}."
            ) from exc
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as exc:
            raise DaemonUnavailable("no daemon is running", hint="Start one with `pier serve`.") from exc
        except PermissionError as exc:
            raise DaemonUnavailable(
                f"no permission to use the daemon's socket {self.paths.control_socket}",
                hint="Run pier as the user who started the daemon.",
            ) from exc
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as exc:
            raise DaemonUnavailable(
                f"the daemon went away or answered nonsense: {exc or type(exc).__name__}",
                hint=f"See {self.paths.daemon_log}, then try again.",
            ) from exc
        finally:
            connection.close()

    @staticmethod
    def _exchange(connection: _Connection, method: str, target: str, body: Any) -> http.client.HTTPResponse:
        headers = {"Accept": "application/json"}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection.request(method, target, body=data, headers=headers)
        response = connection.getresponse()
        if response.status >= 400:
            raise _error(response)
        return response


def _target(path: str, query: Mapping[str, Any] | None) -> str:
    full = path if path.startswith(("/api/", "/openapi", "/docs")) else "/api/v1" + path
    text = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in (query or {}).items() if v is not None}
    return quote(full, safe="/:@?&=%+") + (f"?{urlencode(text)}" if text else "")


def _error(response: http.client.HTTPResponse) -> PierError:
    try:
        raw: Any = json.loads(response.read(1 << 20))["error"]
        return from_dict(raw)
    except (ValueError, KeyError, TypeError):
        return DaemonUnavailable(f"the daemon answered HTTP {response.status}")


def _numbers(version: str) -> tuple[int, ...]:
    head = version.split("+")[0]
    return tuple(int(part) for part in head.split(".") if part.isdecimal())


def _compare(left: str, right: str) -> int:
    a, b = _numbers(left), _numbers(right)
    return (a > b) - (a < b) if a != b else 0


def spawn(paths: Paths, args: tuple[str, ...] = ()) -> None:
    """Start a background daemon and return once it listens, or another one does; raises what kept it from starting.

    The daemon holds the other end of a pipe: one line says how the start went, its closing that the daemon died.
    """
    read, write = os.pipe()
    command = [sys.executable, "-m", "pierhead.daemon", "--background", "--ready-fd", str(write), *args]
    try:
        child = subprocess.Popen(
            command, pass_fds=(write,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    finally:
        os.close(write)
    try:
        line = _first_line(read, START_TIMEOUT)
    finally:
        os.close(read)
        child.wait(timeout=START_TIMEOUT)
    if line is None:
        raise DaemonUnavailable(
            "the daemon ended while it was starting" if child.returncode else "the daemon did not become ready",
            hint=f"See {paths.daemon_log}, or run `pier serve` to watch it start.",
        )
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise from_dict(answer["error"])


def _first_line(fd: int, timeout: float) -> bytes | None:
    deadline = time.monotonic() + timeout
    data = b""
    while b"\n" not in data:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return None
        chunk = os.read(fd, 65536)
        if not chunk:
            return None
        data += chunk
    return data.partition(b"\n")[0]
