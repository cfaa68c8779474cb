"""What every HTTP client here shares: retries, back-off, ranges, reasons without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import ipaddress
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from pierhead.config import SourceSettings
from pierhead.errors import PierError

REDIRECTS = 10
MAX_RETRY_AFTER = 120.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True)
class Retry:
    """``attempts`` in a row that bring nothing end a transfer; waits double from ``first`` to ``most`` seconds."""

    attempts: int = 5
    first: float = 0.5
    most: float = 15.0

    async def pause(self, number: int, after: float | None) -> None:
        """Wait before attempt ``number + 1``: as long as the server asked, else longer each time."""
        wait = min(self.first * 2 ** (number - 1), self.most) * random.uniform(0.75, 1.25)  # noqa: S311
        await asyncio.sleep(wait if after is None else max(after, 0.0))


class Again(Exception):  # control flow between one attempt and the loop around it
    """This attempt failed, another may not; ``after`` is what the server asked to wait."""

    def __init__(self, error: PierError, after: float | None = None, *, connected: bool = True) -> None:
        super().__init__(error.message)
        self.error = error
        self.after = after
        self.connected = connected


def new_session(settings: SourceSettings, read_size: int) -> aiohttp.ClientSession:
    """A session for large bodies, taken as they come; proxies from the environment."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout, sock_read=settings.read_timeout)
    return aiohttp.ClientSession(
        timeout=timeout,
        trust_env=True,
        auto_decompress=False,
        read_bufsize=read_size,
        connector=aiohttp.TCPConnector(limit=0),  # callers bound how much they ask for at once
        headers={"User-Agent": "pierhead", "Accept-Encoding": "identity"},
    )


def redact(url: str) -> str:
    """The address without user, password, query and fragment: fit for messages and logs."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or re.fullmatch(r"127(?:\.\d{1,3}){3}", host) is not None


def is_private(address: str) -> bool:
    """Whether an IP address is one that only machines nearby can reach."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return not (mapped or found).is_global


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
    if text.isdigit():
        return min(float(text), MAX_RETRY_AFTER)
    with contextlib.suppress(ValueError, TypeError):
        moment = email.utils.parsedate_to_datetime(text)
        return min(max(0.0, moment.timestamp() - time.time()), MAX_RETRY_AFTER)
    return None


def reason(exc: BaseException) -> str:
    """Why, without addresses that may carry secrets."""
    if isinstance(exc, aiohttp.ClientConnectorError):
        return str(exc.os_error.strerror or exc.os_error)
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    if isinstance(exc, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return "the connection was cut"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return type(exc).__name__
