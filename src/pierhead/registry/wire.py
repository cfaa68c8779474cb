"""What every HTTP client here shares: retries, back-off, ranges, reasons without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import ipaddress
import os
import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from aiohttp.abc import AbstractResolver

from pierhead.config import SourceSettings
from pierhead.errors import ConfigError, PierError

REDIRECTS = 10
MAX_RETRY_AFTER = 120.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_RATE_LIMIT = re.compile(r"\br=0\s*;\s*t=(\d+)")  # nothing remains, for so many seconds
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """``attempts`` in a row that bring nothing end a transfer; waits double from ``first`` to ``most`` seconds.

    A server to which no connection can be made at all is given up after ``unreachable`` of them.
    """

    attempts: int = 6
    first: float = 0.5
    most: float = 15.0
    unreachable: int = 3

    async def pause(self, number: int, after: float | None) -> None:
        """Wait before attempt ``number + 1``: as long as the server asked, else longer each time."""
        wait = min(self.first * 2 ** (number - 1), self.most) * random.uniform(0.75, 1.25)  # noqa: S311
        await asyncio.sleep(wait if after is None else max(after, 0.0))


class Again(Exception):  # control flow between one attempt and the loop around it
    """This attempt failed, another may not; ``after`` is what the server asked to wait.

    ``connected`` tells a server that breaks off from one that is not there, ``slow`` one that sends next to nothing.
    """

    def __init__(
        self, error: PierError, after: float | None = None, *, connected: bool = True, slow: bool = False
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.after = after
        self.connected = connected
        self.slow = slow


def _nothing() -> int:
    return 0


async def persist(retry: Retry, attempt: Callable[[], Awaitable[T]], landed: Callable[[], int] = _nothing) -> T:
    """Call ``attempt`` until it succeeds or fails for good; ``landed`` grows with what the attempts bring.

    Attempts are counted from the last one that brought something. Raises the last attempt's own error.
    """
    idle, best = 0, landed()
    while True:
        try:
            return await attempt()
        except Again as again:
            moved = landed() > best and not again.slow
            best = max(best, landed())
            idle = 1 if moved else idle + 1
            if idle >= (retry.attempts if again.connected else min(retry.attempts, retry.unreachable)):
                raise again.error from again.__cause__
            await retry.pause(idle, again.after)


def is_unreachable(exc: BaseException) -> bool:
    """Whether a failure means that nobody answers at the address, as opposed to a connection that broke."""
    return isinstance(exc, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)


def new_session(
    settings: SourceSettings, read_size: int, *, resolver: AbstractResolver | None = None
) -> aiohttp.ClientSession:
    """A session for large bodies, taken as they come.

    Proxies come from the environment, unless a ``resolver`` shows that the caller looks at addresses itself.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout, sock_read=settings.read_timeout)
    trust: ssl.SSLContext | bool = new_context(settings.ca_file) if settings.ca_file else True
    connector = aiohttp.TCPConnector(limit=0, resolver=resolver, ssl=trust)  # callers bound how much they ask for
    return aiohttp.ClientSession(
        timeout=timeout,
        trust_env=resolver is None,
        auto_decompress=False,
        read_bufsize=read_size,
        connector=connector,
        headers={"User-Agent": "pierhead", "Accept-Encoding": "identity"},
    )


def new_context(ca_file: str) -> ssl.SSLContext:
    """A context that trusts the system's authorities (or SSL_CERT_FILE's) and those of ``ca_file``."""
    context = ssl.create_default_context()
    if ca_file:
        load_authority(context, Path(ca_file).expanduser())
    return context


def load_authority(context: ssl.SSLContext, file: Path) -> None:
    """Trust the authorities in a file; ConfigError where it cannot be used."""
    try:
        context.load_verify_locations(cafile=file)
    except OSError as exc:  # ssl.SSLError is one
        why = "no PEM certificates" if isinstance(exc, ssl.SSLError) else exc.strerror
        raise ConfigError(
            f"cannot use the certificate authorities in {file}: {why}",
            hint="It must be a readable file of certificates in PEM.",
        ) from exc


def redact(url: str) -> str:
    """The address without user, password, query and fragment: fit for messages and logs."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or re.fullmatch(r"127(?:\.\d{1,3}){3}", host) is not None


def is_private(address: str) -> bool:
    """Whether an IP address is one that only machines nearby can reach, in whatever dress. ValueError for a name."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return not inner.is_global
    return not found.is_global


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: what a secret belongs to."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def content_range(headers: Mapping[str, str]) -> tuple[int, int, int | None] | None:
    """First byte, last byte and total of ``Content-Range``; None where it is absent or odd."""
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if found is None:
        return None
    return int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, two minutes at most."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return min(float(text), MAX_RETRY_AFTER)
    with contextlib.suppress(ValueError, TypeError):
        moment = email.utils.parsedate_to_datetime(text)
        return min(max(0.0, moment.timestamp() - time.time()), MAX_RETRY_AFTER)
    used_up = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    return min(float(used_up[1]), MAX_RETRY_AFTER) if used_up else None


def _plainly(exc: OSError) -> str:
    """The system's words, in place of asyncio's ("Connect call failed ('10.0.0.1', 443)")."""
    if exc.strerror and exc.strerror.startswith("Connect call failed") and exc.errno:
        return os.strerror(exc.errno)
    return str(exc.strerror or exc)


def reason(exc: BaseException) -> str:
    """Why, without addresses that may carry secrets."""
    if isinstance(exc, aiohttp.ClientConnectorError):
        return _plainly(exc.os_error)
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    if isinstance(exc, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return "the connection was cut"
    if isinstance(exc, OSError) and exc.strerror:
        return _plainly(exc)
    return type(exc).__name__
