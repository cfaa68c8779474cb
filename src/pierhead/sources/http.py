"""HTTP for sources: redirects that keep secrets, retries with back-off, and downloads that go on where they stopped."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import aiohttp
import msgspec
from yarl import URL

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, CorruptData, NotFound, PierError, SourceUnavailable, UsageError
from pierhead.registry.transfer import Changed, Origin, transfer, validator_of
from pierhead.registry.wire import (
    REDIRECTS,
    TRANSIENT,
    Again,
    Retry,
    content_range,
    is_loopback,
    is_unreachable,
    new_session,
    origin,
    persist,
    reason,
    redact,
    retry_after,
)
from pierhead.sources.base import Sink

READ = 256 << 10
CHANGES = 5


@dataclass(frozen=True)
class Remote:
    """A file behind an address, as a first look found it; ``validator`` is what ``If-Range`` may carry."""

    url: str
    size: int | None = None
    validator: str = ""
    ranges: bool = False
    token: str = ""
    digest: str = ""
    filename: str = ""


@dataclass(frozen=True)
class Linked:
    """What a hub says of a file before it leads to its storage: the content's hash (git's or SHA-256) and its size."""

    etag: str
    size: int | None


class Http:
    """One session of requests; use as an async context manager. Proxies come from the environment.

    Tokens are sent as ``Authorization``, and in the cookie ``cookie`` where a server wants that as well.
    """

    def __init__(self, settings: SourceSettings, *, retry: Retry | None = None, cookie: str = "") -> None:
        self._settings = settings
        self._cookie = cookie
        self.retry = retry or Retry()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = new_session(self._settings, READ)
        return self._session

    def _check(self, url: str, before: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme == "https":
            return
        if parts.scheme != "http":
            raise SourceUnavailable(f"{redact(before or url)} leads to an address of another kind")
        if before and urlsplit(before).scheme == "https":
            raise SourceUnavailable(f"{redact(before)} redirects from https to plain http, which is refused")
        if not is_loopback(parts.hostname or "") and not self._settings.allow_http:
            raise UsageError(
                f"plain http is refused: {redact(url)}",
                hint="Use https, or set allow_http = true in [sources] of config.toml.",
            )

    @contextlib.asynccontextmanager
    async def _request(
        self, url: str, headers: Mapping[str, str], token: str, encoded: bool = False, method: str = "GET"
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Ask through redirects; a token goes only to the place it was given for, and so does HEAD."""
        self._check(url)
        home = origin(url)
        for hop in range(REDIRECTS):
            sent = dict(headers)
            if token and origin(url) == home:
                sent["Authorization"] = f"Bearer {token}"
                if self._cookie:
                    sent["Cookie"] = f"{self._cookie}={token}"
            async with self._open_session().request(
                method, URL(url, encoded=encoded or hop > 0), headers=sent, allow_redirects=False
            ) as response:
                target = urljoin(url, response.headers.get("Location", ""))
                leads = response.status in (301, 302, 303, 307, 308) and "Location" in response.headers
                if not leads or (method == "HEAD" and origin(target) != home):
                    yield response
                    return
            self._check(target, url)
            url = target
        raise SourceUnavailable(f"{redact(url)}: more than {REDIRECTS} redirects")

    @contextlib.asynccontextmanager
    async def response(
        self, url: str, headers: Mapping[str, str], token: str, *, encoded: bool = False, method: str = "GET"
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """A response with status 200, 206 or 416; Again for what may pass, PierError for the rest."""
        where = redact(url)
        try:
            async with self._request(url, headers, token, encoded, method) as response:
                if method != "HEAD" or response.status >= 400:
                    _raise_for_status(response, where, bool(token))
                yield response
        except aiohttp.ClientSSLError as exc:
            raise SourceUnavailable(
                f"no secure connection to {where}: {reason(exc)}",
                hint="Check the clock, and SSL_CERT_FILE if your network has its own certificate authority.",
            ) from exc
        except (aiohttp.InvalidURL, ValueError) as exc:
            raise SourceUnavailable(f"{where} is not an address that can be asked") from exc
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            if isinstance(exc, ssl.SSLError):
                raise SourceUnavailable(f"no secure connection to {where}: {reason(exc)}") from exc
            host = urlsplit(url).hostname
            raise Again(
                SourceUnavailable(
                    f"cannot read from {host}: {reason(exc)}",
                    hint="Check the network and the proxy settings, then try again. Without a network, "
                    "`pier import` takes an archive.",
                ),
                connected=not is_unreachable(exc),
            ) from exc

    # --- small things ---------------------------------------------------------------------------------------------

    async def json(self, url: str, *, token: str = "", limit: int = 32 << 20) -> Any:
        """A JSON document of at most ``limit`` bytes."""
        data = await persist(self.retry, lambda: self._whole(url, token, limit))
        try:
            return msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise SourceUnavailable(f"{redact(url)} did not answer with JSON") from exc

    async def whole(self, url: str, *, token: str = "", limit: int = 16 << 20) -> bytes:
        """A whole small file."""
        return await persist(self.retry, lambda: self._whole(url, token, limit))

    async def probe(self, url: str, *, token: str = "", digest: str = "") -> Remote:
        """Size, validator and whether ranges work, by asking for the first byte."""
        return await persist(self.retry, lambda: self._probe(url, token, digest))

    async def linked(self, url: str, *, token: str = "") -> Linked:
        """What a hub says of a file without giving it."""
        return await persist(self.retry, lambda: self._linked(url, token))

    async def _linked(self, url: str, token: str) -> Linked:
        async with self.response(url, {}, token, method="HEAD") as response:
            etag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag", "")
            size = response.headers.get("X-Linked-Size", "")
            own = response.content_length if response.status == 200 else None
            return Linked(etag.removeprefix("W/").strip('"'), int(size) if size.isdecimal() else own)

    async def read(self, remote: Remote, offset: int, length: int) -> bytes:
        """A part of the file, by range where the server can, else by reading up to it."""
        return await persist(self.retry, lambda: self._read(remote, offset, length))

    async def _whole(self, url: str, token: str, limit: int) -> bytes:
        async with self.response(url, {}, token) as response:
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > limit:
                    raise CorruptData(f"{redact(url)} answers with more than {limit} bytes")
            return bytes(data)

    async def _probe(self, url: str, token: str, digest: str) -> Remote:
        async with self.response(url, {"Range": "bytes=0-0"}, token) as response:
            part = content_range(response.headers)
            if response.status == 206 and part is not None:
                size = part[2]
            elif response.status == 416:
                size = 0
            else:
                size = response.content_length
            name = response.content_disposition.filename if response.content_disposition else None
            return Remote(url, size, validator_of(response), response.status == 206, token, digest, name or "")

    async def _read(self, remote: Remote, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        async with self.response(remote.url, headers, remote.token) as response:
            if response.status == 416:
                return b""
            skip = offset if response.status == 200 else 0
            part = content_range(response.headers)
            if response.status == 206 and (part is None or part[0] != offset):
                raise CorruptData(f"{redact(remote.url)} answers with another part than it was asked for")
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(data) >= length:
                    break
            return bytes(data[:length])

    # --- downloads ------------------------------------------------------------------------------------------------

    async def download(self, remote: Remote, sink: Sink) -> None:
        """Bring the file into ``sink`` from its offset to the end; drops, stalls and 5xx are tried again."""
        for _ in range(CHANGES):
            door = _Door(self, remote)
            origin = Origin(
                door.ask,
                redact(remote.url),
                remote.size,
                self.retry,
                exact=bool(remote.digest),
                validator=remote.validator,
                ranges=remote.ranges,
                told="it announced",
                patience=self._settings.read_timeout,
            )
            try:
                await transfer(origin, sink.offset, sink.write_all, self._settings.registry_connections)
            except Changed:
                await sink.restart()
                remote = await self._again(remote)
            except PierError as error:
                error.data.setdefault("received", sink.offset)
                raise
            else:
                return
        raise SourceUnavailable(f"{redact(remote.url)} is another file each time it is asked for", hint="Try later.")

    async def _again(self, remote: Remote) -> Remote:
        """The file that is behind the address now; CorruptData when it is not as long as was announced."""
        found = await self.probe(remote.url, token=remote.token, digest=remote.digest)
        if remote.size is not None and found.size != remote.size:
            where = redact(remote.url)
            raise CorruptData(f"{where} has {found.size} bytes now, {remote.size} were announced", hint="Try again.")
        return found


class _Door:
    """Requests for one file; where the server redirects to is kept until that place refuses: hubs count requests."""

    def __init__(self, http: Http, remote: Remote) -> None:
        self._http = http
        self._remote = remote
        self._target = ""

    @contextlib.asynccontextmanager
    async def ask(self, headers: Mapping[str, str]) -> AsyncGenerator[aiohttp.ClientResponse]:
        """One GET of the file, or of a part of it."""
        async with contextlib.AsyncExitStack() as stack:
            response = await self._short_cut(headers, stack) if self._target else None
            if response is None:
                asked = self._http.response(self._remote.url, headers, self._remote.token)
                response = await stack.enter_async_context(asked)
                landed = str(response.url)
                self._target = landed if origin(landed) != origin(self._remote.url) else ""
            yield response

    async def _short_cut(
        self, headers: Mapping[str, str], stack: contextlib.AsyncExitStack
    ) -> aiohttp.ClientResponse | None:
        """Straight to where the file was found last; None where that address has expired."""
        try:
            return await stack.enter_async_context(self._http.response(self._target, headers, "", encoded=True))
        except Again:
            self._target = ""
            raise
        except PierError:
            self._target = ""
            return None


def _raise_for_status(response: aiohttp.ClientResponse, where: str, with_token: bool) -> None:
    status = response.status
    if status in (200, 206, 416):
        return
    said = f"{where} answers {status} {response.reason or ''}".rstrip()
    code = response.headers.get("X-Error-Code", "")
    if status in TRANSIENT:
        error = SourceUnavailable(said, hint="The server is busy or broken; try again later.", data={"status": status})
        raise Again(error, retry_after(response.headers))
    if status in (401, 403):
        hint = "The token that was sent does not allow this." if with_token else "It needs a login or a token."
        raise AccessDenied(said, hint=hint, data={"status": status, "error_code": code})
    if status in (404, 410):
        raise NotFound(said, hint="Check the reference.", data={"status": status, "error_code": code})
    raise SourceUnavailable(said, data={"status": status, "error_code": code})
