"""Requests with bodies to one hub: its token stays with it, its refusals become errors; knows no protocol."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterable, Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urljoin, urlsplit

import aiohttp
import msgspec
from yarl import URL

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, Conflict, NotFound, PierError, SourceUnavailable, UsageError
from pierhead.registry.wire import (
    TRANSIENT,
    Again,
    Retry,
    is_loopback,
    is_unreachable,
    new_session,
    origin,
    persist,
    reason,
    redact,
    retry_after,
)

MAX_ANSWER = 16 << 20
READ = 64 << 10
Body = Callable[[], AsyncIterable[bytes] | bytes]
T = TypeVar("T")


class Sender:
    """One hub at ``address``; use as an async context manager. Proxies come from the environment."""

    def __init__(
        self, settings: SourceSettings, address: str, token: str, *, retry: Retry | None = None, cookie: str = ""
    ) -> None:
        self.address = address
        self.retry = retry or Retry()
        self._settings = settings
        self._token = token
        self._cookie = cookie
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def host(self) -> str:
        return urlsplit(self.address).hostname or self.address

    async def json(self, method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        """The answer to a JSON document (or to raw bytes); None where it has no body."""
        data = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        kind = {} if body is None else {"Content-Type": "application/json"}
        _, answer = await self.send(method, url, lambda: data, headers={**kind, **(headers or {})})
        try:
            return msgspec.json.decode(answer) if answer.strip() else None
        except (msgspec.DecodeError, RecursionError) as exc:
            raise SourceUnavailable(f"{redact(url)} did not answer with JSON") from exc

    async def send(
        self,
        method: str,
        url: str,
        body: Body,
        *,
        headers: Mapping[str, str] | None = None,
        once: bool = False,
        trusted: bool = False,
    ) -> tuple[Mapping[str, str], bytes]:
        """Headers and body of the answer. ``body`` is made anew for each attempt; ``once`` makes one attempt only.

        A ``trusted`` address is given the token, too.
        """
        self._check(url)
        attempts = Retry(attempts=1) if once else self.retry
        return await persist(attempts, lambda: self._send(method, url, body, headers or {}, trusted))

    def _check(self, url: str) -> None:
        parts = urlsplit(url)
        plain = parts.scheme == "http" and is_loopback(parts.hostname or "") and is_loopback(self.host)
        if not parts.hostname or (parts.scheme != "https" and not plain and not self._settings.allow_http):
            raise SourceUnavailable(f"{self.host} wants files sent to an address that is refused: {redact(url)}")

    async def _send(
        self, method: str, url: str, body: Body, headers: Mapping[str, str], trusted: bool
    ) -> tuple[Mapping[str, str], bytes]:
        sent = dict(headers)
        ours = origin(url) == origin(self.address)
        if self._token and (ours or trusted):
            sent["Authorization"] = f"Bearer {self._token}"
            if self._cookie:
                sent["Cookie"] = f"{self._cookie}={self._token}"
        try:
            async with self._open().request(
                method, URL(url, encoded=True), headers=sent, data=body(), allow_redirects=False
            ) as response:
                answer = bytearray()
                async for chunk in response.content.iter_any():
                    answer += chunk
                    if len(answer) > MAX_ANSWER:
                        raise SourceUnavailable(f"{redact(url)} answers with too much")
                self._raise_for_status(response, bytes(answer), ours)
                return response.headers.copy(), bytes(answer)
        except (aiohttp.InvalidURL, ValueError) as exc:
            raise SourceUnavailable(f"{redact(url)} is not an address that can be asked") from exc
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            error = SourceUnavailable(f"cannot send to {urlsplit(url).hostname}: {reason(exc)}", hint="Try again.")
            if isinstance(exc, ssl.SSLError | aiohttp.ClientSSLError):
                raise error from exc
            raise Again(error, connected=not is_unreachable(exc)) from exc

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = new_session(self._settings, READ)
        return self._session

    def _raise_for_status(self, response: aiohttp.ClientResponse, body: bytes, ours: bool) -> None:
        status = response.status
        if 200 <= status < 300:
            return
        where = redact(str(response.url))
        if status in (301, 302, 307, 308) and ours:
            moved = redact(urljoin(str(response.url), response.headers.get("Location", "")))
            raise UsageError(f"{where} has moved to {moved}", hint="Use the repository's new name.")
        words = _words(body, response.headers) if ours else ""
        said = f"{where} answers {status} {words or response.reason or ''}".rstrip()
        data = {"status": status, "error_code": response.headers.get("X-Error-Code", ""), "said": words, "ours": ours}
        if status in TRANSIENT:
            raise Again(SourceUnavailable(said, hint="Try again later.", data=data), retry_after(response.headers))
        raise _ERRORS.get(status, SourceUnavailable)(said, hint=_HINTS.get(status), data=data)


_ERRORS: dict[int, type[PierError]] = {
    400: UsageError, 401: AccessDenied, 403: AccessDenied, 404: NotFound, 409: Conflict, 412: Conflict,
    413: UsageError, 422: UsageError,
}  # fmt: skip
_HINTS = {
    400: "See what the hub says; the name, the card's front matter or a file's name may not be to its liking.",
    401: "Use a token that may write, of an account that may write there.",
    403: "Use a token that may write, of an account that may write there.",
    413: "A file is too large for the hub.",
}


def _words(body: bytes, headers: Mapping[str, str]) -> str:
    """The hub's own words for an error, on one line."""
    text = headers.get("X-Error-Message", "")
    with contextlib.suppress(msgspec.DecodeError, RecursionError, AttributeError, TypeError):
        found = msgspec.json.decode(body)
        text = str(found.get("error") or found.get("Message") or found.get("message") or text)
    return "".join(c if c.isprintable() else " " for c in text)[:300]
