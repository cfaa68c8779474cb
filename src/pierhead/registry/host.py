"""Requests to one registry or mirror: logins, redirects, and its refusals as errors of ours; knows no repository."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
import msgspec

from pierhead.config import SourceSettings
from pierhead.errors import AccessDenied, NotFound, PierError, SourceUnavailable
from pierhead.registry.connections import Connections, Resolver
from pierhead.registry.credentials import Login
from pierhead.registry.places import Place
from pierhead.registry.tokens import Tokens
from pierhead.registry.wire import (
    REDIRECTS,
    TRANSIENT,
    Again,
    is_unreachable,
    origin,
    reason,
    redact,
    retry_after,
)

MAX_ERROR = 64 << 10
MOVED = (301, 302, 303, 307, 308)


class Host:
    """One place with its login; what it asks us to wait for holds for all requests to it."""

    def __init__(
        self,
        place: Place,
        settings: SourceSettings,
        login: Login,
        *,
        offline: bool = False,
        resolver: Resolver = aiohttp.ThreadedResolver,
    ) -> None:
        self.place = place
        self._connections = Connections(place, settings, resolver=resolver)
        self.tokens = Tokens(self._connections, login, offline=offline)
        self._not_before = 0.0  # on the monotonic clock

    async def close(self) -> None:
        await self._connections.close()

    @contextlib.asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        *,
        scope: str,
        headers: Mapping[str, str] | None = None,
        data: Any = None,
        accept: tuple[int, ...] = (),
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """One request, with a token where the registry wants one; Again for what may pass, PierError for the rest.

        The statuses in ``accept`` are answers like others.
        """
        where = redact(url)
        try:
            for last in (False, False, True):  # others may have used up what was renewed
                used = self.tokens.header(scope)
                async with self._follow(method, url, used, headers or {}, data) as response:
                    ours = self._is_ours(str(response.url))
                    if response.status != 401 or last or not ours:
                        if response.status not in accept:
                            await self._raise_for_status(response, where, ours)
                        yield response
                        return
                    challenges = response.headers.getall("WWW-Authenticate", [])
                await self.tokens.renew(scope, used, challenges)
                if data is not None and not isinstance(data, bytes):  # a stream is read only once
                    raise Again(SourceUnavailable(f"{where} wants a new token"), 0.0)
        except aiohttp.ClientSSLError as exc:
            raise _insecure(where, exc) from exc
        except (aiohttp.InvalidURL, ValueError) as exc:
            raise SourceUnavailable(f"{where} is not an address that can be asked") from exc
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            if isinstance(exc, ssl.SSLError):
                raise _insecure(where, exc) from exc
            error = SourceUnavailable(
                f"cannot talk to {_asked(url)}: {reason(exc)}",
                hint="Check the name, the network and the proxy settings, then try again.",
            )
            raise Again(error, connected=not is_unreachable(exc)) from exc

    @contextlib.asynccontextmanager
    async def _follow(
        self, method: str, url: str, authorization: str, headers: Mapping[str, str], data: Any
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """Through redirects (object storage), where secrets do not go along."""
        for _ in range(REDIRECTS):
            sent = dict(headers)
            if authorization and self._is_ours(url):
                sent["Authorization"] = authorization
            await self._hold()
            async with self._connections.send(method, url, headers=sent, data=data) as response:
                location = response.headers.get("Location", "")
                if method not in ("GET", "HEAD") or response.status not in MOVED or not location:
                    yield response
                    return
            target = urljoin(url, location)
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
                raise SourceUnavailable(f"{redact(url)} redirects from https to plain http, which is refused")
            url = target
        raise SourceUnavailable(f"{redact(url)}: more than {REDIRECTS} redirects")

    def _is_ours(self, url: str) -> bool:
        return origin(url) == origin(self.place.base)

    async def _hold(self) -> None:
        """A registry that throttles one request would throttle the others beside it too."""
        wait = self._not_before - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)

    async def _raise_for_status(self, response: aiohttp.ClientResponse, where: str, ours: bool) -> None:
        status = response.status
        if status < 300:
            return
        said = f"{where} answers {status} {words(await response.content.read(MAX_ERROR)) or response.reason or ''}"
        data = {"status": status}
        if status in TRANSIENT:
            after = retry_after(response.headers)
            if ours and after:
                self._not_before = max(self._not_before, time.monotonic() + after)
            busy = "The registry is busy or broken; try again later."
            raise Again(SourceUnavailable(said.rstrip(), hint=busy, data=data), after)
        if not ours and status in (400, 401, 403):  # its signed address ran out: the registry makes another
            raise Again(SourceUnavailable(f"the storage of {said}".rstrip(), hint="Try again later.", data=data))
        raise self._refusal(status, self._missing(where) if status == 404 else said.rstrip(), data)

    def _missing(self, where: str) -> str:
        """What is not there, as its user names it."""
        path = urlsplit(where).path
        repository, manifest, target = path.removeprefix("/v2/").rpartition("/manifests/")
        if not manifest:
            return f"{where} answers 404"
        return f"{self.place.host} has no {repository}{'@' if ':' in target else ':'}{target} (404)"

    def _refusal(self, status: int, said: str, data: dict[str, Any]) -> PierError:
        if status == 401:
            return self.tokens.denied()
        if status == 403:
            hint = f"Your login does not allow this; `pier login {self.place.host}` takes another."
            return AccessDenied(said, hint=hint, data=data)
        if status in (404, 410):
            return NotFound(said, hint="Check repository and tag.", data=data)
        return SourceUnavailable(said, data=data)


def _asked(url: str) -> str:
    """Host and port, without a login."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _insecure(where: str, exc: BaseException) -> SourceUnavailable:
    return SourceUnavailable(
        f"no secure connection to {where}: {reason(exc)}",
        hint="Check the clock. Your network's own certificate authority can be named as ca_file in [sources] of "
        "config.toml; a registry without TLS in insecure_registries there.",
    )


def words(body: bytes) -> str:
    """The registry's own words for an error, on one line."""
    try:
        errors = msgspec.json.decode(body)["errors"]
        text = "; ".join(f"{e.get('code', '')} {e.get('message', '')}".strip() for e in errors[:3])
    except (msgspec.DecodeError, RecursionError, KeyError, TypeError, AttributeError):
        return ""
    return "".join(c if c.isprintable() else " " for c in text)[:500]
