"""Requests to one registry: its tokens, its redirects, its refusals as errors of ours; knows nothing of models."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

import aiohttp
import msgspec
from yarl import URL

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, CorruptData, NotFound, PierError, SourceUnavailable, UsageError
from pierhead.registry.credentials import Login
from pierhead.registry.name import HUB, ImageName
from pierhead.registry.wire import (
    REDIRECTS,
    TRANSIENT,
    Again,
    Retry,
    is_loopback,
    is_private,
    new_session,
    origin,
    reason,
    redact,
    retry_after,
)

MAX_DOCUMENT = 4 << 20  # the least that the standard asks registries to take
MAX_TOKEN = 1 << 20
MAX_ERROR = 64 << 10
READ = 1 << 20
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
T = TypeVar("T")


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""


class Registry:
    """One host and repository; use as an async context manager. Proxies come from the environment."""

    def __init__(self, name: ImageName, settings: SourceSettings, login: Login, *, retry: Retry | None = None) -> None:
        self.name = name
        self.retry = retry or Retry()
        self._settings = settings
        self._login = login
        self._session: aiohttp.ClientSession | None = None
        self._authorization: dict[str, str] = {}  # by scope
        host = "registry-1.docker.io" if name.host == HUB else name.host
        plain = is_loopback(urlsplit(f"//{host}").hostname or "") or name.host in settings.insecure_registries
        self.base = f"{'http' if plain else 'https'}://{host}"
        self._host = urlsplit(self.base).hostname or ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    def url(self, kind: str, rest: str) -> str:
        """The address of a manifest, blob, upload or list of this repository."""
        return f"{self.base}/v2/{self.name.repository}/{kind}/{rest}"

    # --- documents ------------------------------------------------------------------------------------------------

    async def manifest(self, target: str) -> tuple[str, bytes]:
        """The manifest that a tag or digest points to: its media type and its very bytes."""
        return await self.repeat(lambda: self._manifest(target))

    async def _manifest(self, target: str) -> tuple[str, bytes]:
        async with self.request("GET", self.url("manifests", target), headers={"Accept": ", ".join(MANIFESTS)}) as got:
            body = await limited(got, MAX_DOCUMENT, redact(str(got.url)))
            return got.content_type, body

    async def put_manifest(self, target: str, media_type: str, body: bytes) -> None:
        """Publish a manifest under a tag or its digest."""

        async def attempt() -> None:
            url = self.url("manifests", target)
            async with self.request("PUT", url, push=True, headers={"Content-Type": media_type}, data=body):
                pass

        await self.repeat(attempt)

    async def small(self, digest: str, limit: int = MAX_DOCUMENT) -> bytes:
        """A whole small blob, such as a config; the caller checks its digest."""

        async def attempt() -> bytes:
            async with self.request("GET", self.url("blobs", digest)) as got:
                return await limited(got, limit, redact(str(got.url)))

        return await self.repeat(attempt)

    # --- one request ----------------------------------------------------------------------------------------------

    async def repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Until it succeeds, or fails in a way that will not pass."""
        for number in range(1, self.retry.attempts + 1):
            try:
                return await attempt()
            except Again as again:
                if number >= (self.retry.attempts if again.connected else 2):
                    raise again.error from again.__cause__
                await self.retry.pause(number, again.after)
        raise AssertionError

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        *,
        push: bool = False,
        headers: Mapping[str, str] | None = None,
        data: Any = None,
        missing_ok: bool = False,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """One request, with a token where the registry wants one; Again for what may pass, PierError for the rest.

        With ``missing_ok`` a 404 is an answer like others.
        """
        scope = f"repository:{self.name.repository}:{'pull,push' if push else 'pull'}"
        where = redact(url)
        connected = False
        try:
            for last in (False, True):
                async with self._follow(method, url, scope, headers or {}, data) as response:
                    connected = True
                    ours = origin(str(response.url)) == origin(self.base)
                    if response.status != 401 or last or not ours:
                        if not (missing_ok and response.status == 404):
                            await self._raise_for_status(response, where)
                        yield response
                        return
                    challenges = response.headers.getall("WWW-Authenticate", [])
                await self._authorize(challenges, scope)
                if data is not None and not isinstance(data, bytes):  # a stream is read only once
                    raise Again(SourceUnavailable(f"{where} wants a new token"), 0.0)
        except aiohttp.ClientSSLError as exc:
            raise SourceUnavailable(
                f"no secure connection to {where}: {reason(exc)}",
                hint="Check the clock, and SSL_CERT_FILE if your network has its own certificate authority. A registry "
                "without TLS must be named in insecure_registries in [sources] of config.toml.",
            ) from exc
        except (aiohttp.InvalidURL, ValueError) as exc:
            raise SourceUnavailable(f"{where} is not an address that can be asked") from exc
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            if isinstance(exc, ssl.SSLError):
                raise SourceUnavailable(f"no secure connection to {where}: {reason(exc)}") from exc
            error = SourceUnavailable(
                f"cannot talk to {urlsplit(url).hostname}: {reason(exc)}", hint="Check the network, then try again."
            )
            raise Again(error, connected=connected) from exc

    @contextlib.asynccontextmanager
    async def _follow(
        self, method: str, url: str, scope: str, headers: Mapping[str, str], data: Any
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Through redirects (object storage), where secrets do not go along."""
        for hop in range(REDIRECTS):
            await self._check(url)
            sent = dict(headers)
            if origin(url) == origin(self.base) and scope in self._authorization:
                sent["Authorization"] = self._authorization[scope]
            async with self._open().request(
                method, URL(url, encoded=hop > 0 or "?" in url), headers=sent, data=data, allow_redirects=False
            ) as response:
                location = response.headers.get("Location", "")
                if method not in ("GET", "HEAD") or response.status not in (301, 302, 303, 307, 308) or not location:
                    yield response
                    return
            target = urljoin(url, location)
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
                raise SourceUnavailable(f"{redact(url)} redirects from https to plain http, which is refused")
            url = target
        raise SourceUnavailable(f"{redact(url)}: more than {REDIRECTS} redirects")

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = new_session(self._settings, READ)
        return self._session

    async def _check(self, url: str) -> None:
        """Refuse other kinds of address, and addresses nearby that a registry far away points to."""
        parts = urlsplit(url)
        if parts.scheme not in ("https", "http") or not parts.hostname:
            raise SourceUnavailable(f"{self.name.host} leads to an address of another kind")
        if parts.hostname == self._host:
            if parts.scheme == "http" and urlsplit(self.base).scheme == "https":
                raise SourceUnavailable(f"{self.name.host} leads to plain http, which is refused")
            return
        if await _near(parts.hostname) and not await _near(self._host):
            raise SourceUnavailable(f"{self.name.host} leads to an address in your own network, which is refused")

    # --- tokens ---------------------------------------------------------------------------------------------------

    async def _authorize(self, challenges: list[str], scope: str) -> None:
        """Take up one of the registry's challenges; AccessDenied where it cannot be met."""
        self._authorization.pop(scope, None)
        for text in challenges:
            kind, _, rest = text.strip().partition(" ")
            if kind.lower() == "bearer":
                given = dict(_PARAMETER.findall(rest))
                self._authorization[scope] = "Bearer " + await self._token(given, scope)
                return
            if kind.lower() == "basic" and self._login.user:
                self._authorization[scope] = self._login.basic
                return
        raise self._login_needed()

    def _login_needed(self) -> AccessDenied:
        if self._login:
            return AccessDenied(f"{self.name.host} does not accept the login that is kept for it", hint=self._hint)
        return AccessDenied(f"{self.name.host} wants a login", hint=self._hint)

    @property
    def _hint(self) -> str:
        return f"Type `docker login {self.name.host}` (or `podman login`); its config.json is read."

    async def _token(self, given: Mapping[str, str], scope: str) -> str:
        realm = given.get("realm", "")
        await self._check_realm(realm)
        wanted = {"service": given["service"]} if given.get("service") else {}
        wanted["scope"] = given.get("scope") or scope
        where = redact(realm)
        if self._login.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": self._login.identity_token, "client_id": "pierhead"}
            asked = self._open().post(URL(realm), data={**form, **wanted}, allow_redirects=False)
        else:
            headers = {"Authorization": self._login.basic} if self._login.user else {}
            mark = "&" if "?" in realm else "?"
            address = URL(f"{realm}{mark}{urlencode(wanted)}", encoded=True)
            asked = self._open().get(address, headers=headers, allow_redirects=False)
        async with asked as response:
            if response.status in (400, 401, 403):
                raise self._login_needed()
            if response.status in TRANSIENT:
                raise Again(SourceUnavailable(f"{where} answers {response.status}"), retry_after(response.headers))
            if response.status != 200:
                raise SourceUnavailable(f"{where} answers {response.status} instead of a token")
            body = await limited(response, MAX_TOKEN, where)
        try:
            made = msgspec.json.decode(body, type=_Token)
        except msgspec.DecodeError as exc:
            raise SourceUnavailable(f"{where} does not answer with a token") from exc
        token = made.token or made.access_token
        if not token or not token.isascii() or not token.isprintable():
            raise SourceUnavailable(f"{where} does not answer with a token")
        return token

    async def _check_realm(self, realm: str) -> None:
        """A registry says where tokens are made; not in our own network, and not in the clear."""
        parts = urlsplit(realm)
        if parts.scheme not in ("https", "http") or not parts.hostname or parts.username:
            raise SourceUnavailable(f"{self.name.host} names no usable place for tokens")
        if parts.hostname == self._host and (parts.scheme == "https" or urlsplit(self.base).scheme == "http"):
            return
        if parts.scheme == "http" and not is_loopback(self._host):
            raise SourceUnavailable(f"{self.name.host} wants its token fetched over plain http, which is refused")
        if await _near(parts.hostname):
            raise SourceUnavailable(
                f"{self.name.host} wants its token fetched from your own network ({parts.hostname}): refused",
                hint="A registry could steal your login, or reach your network, that way.",
            )

    async def _raise_for_status(self, response: aiohttp.ClientResponse, where: str) -> None:
        status = response.status
        if status < 300 or status == 416:
            return
        said = f"{where} answers {status} {_words(await response.content.read(MAX_ERROR)) or response.reason or ''}"
        data = {"status": status}
        if status in TRANSIENT:
            error: PierError = SourceUnavailable(
                said.rstrip(), hint="The registry is busy or broken; try again later.", data=data
            )
            raise Again(error, retry_after(response.headers))
        if status == 401:
            raise self._login_needed()
        if status == 403:
            raise AccessDenied(said, hint="Your login does not allow this.", data=data)
        if status in (404, 410):
            raise NotFound(said, hint="Check repository and tag.", data=data)
        raise SourceUnavailable(said, data=data)


async def limited(response: aiohttp.ClientResponse, limit: int, where: str) -> bytes:
    """The whole body; CorruptData when it is longer than it may be."""
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > limit:
            raise CorruptData(f"{where} answers with more than {limit} bytes")
    return bytes(data)


async def _near(host: str) -> bool:
    """Whether a host is, or is found at, an address that only machines nearby reach."""
    if is_loopback(host):
        return True
    with contextlib.suppress(ValueError):
        return is_private(host)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False  # the request itself will say so
    return any(is_private(str(entry[4][0])) for entry in found)


def _words(body: bytes) -> str:
    """The registry's own words for an error, on one line."""
    try:
        errors = msgspec.json.decode(body)["errors"]
        text = "; ".join(f"{e.get('code', '')} {e.get('message', '')}".strip() for e in errors[:3])
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return ""
    return "".join(c if c.isprintable() else " " for c in text)[:500]


def check_plain(name: ImageName) -> None:
    """UsageError for a name that cannot be pushed to."""
    if name.digest:
        raise UsageError(f"{name} names a digest; a push needs a tag", hint=f"Write {name.host}/{name.repository}:tag.")
