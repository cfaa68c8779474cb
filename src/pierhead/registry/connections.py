"""One registry's connections: which addresses are connected to, trusting whom, through which proxy; no retries."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from pierhead.config import SourceSettings
from pierhead.errors import SourceUnavailable
from pierhead.registry.guard import Guard, Home, Refused, literal, proxy_for, proxy_hosts, resolves_near
from pierhead.registry.places import Place
from pierhead.registry.tls import Trust
from pierhead.registry.wire import is_loopback, new_session

READ = 1 << 20
Resolver = Callable[[], AbstractResolver]


class Connections:
    """Requests of one kind to a place and to where it leads; logins have sessions of their own, with stricter rules."""

    def __init__(
        self, place: Place, settings: SourceSettings, *, resolver: Resolver = aiohttp.ThreadedResolver
    ) -> None:
        self.place = place
        self._settings = settings
        self._resolver = resolver
        self._home = Home(place.hostname)
        self._trust = Trust(settings)
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    @contextlib.asynccontextmanager
    async def send(
        self, method: str, url: str, *, headers: Mapping[str, str], data: Any = None, login: bool = False
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """One request, no redirects; ``url`` is sent as it is. SourceUnavailable for an address that is refused.

        ``login`` is for whoever makes tokens: that may be another host, but none nearby.
        """
        proxy = proxy_for(url)
        await (self._check_login(url, proxy) if login else self._check(url, proxy))
        options: dict[str, Any] = {"proxy": proxy or None}
        if urlsplit(url).scheme == "https":
            options["ssl"] = self._trust.known(url) or await asyncio.to_thread(self._trust.context, url)
        try:
            async with self._session(login).request(
                method, URL(url, encoded=True), headers=headers, data=data, allow_redirects=False, **options
            ) as response:
                yield response
        except aiohttp.ClientConnectorError as exc:
            if isinstance(exc.os_error, Refused):
                raise self._refused(urlsplit(url).hostname or "", login) from exc
            raise

    def _session(self, login: bool) -> aiohttp.ClientSession:
        if login not in self._sessions:
            trusted = proxy_hosts().union(self._settings.token_hosts if login else ())
            guard = Guard(self._home, trusted, self._resolver(), strict=login)
            self._sessions[login] = new_session(self._settings, READ, resolver=guard)
        return self._sessions[login]

    async def _check(self, url: str, proxy: str) -> None:
        """Refuse other kinds of address, and addresses nearby that a registry far away points to."""
        parts = urlsplit(url)
        if parts.scheme not in ("https", "http") or not parts.hostname:
            raise SourceUnavailable(f"{self.place.host} leads to an address of another kind")
        if parts.scheme == "http" and not self.place.plain:  # not even elsewhere: an upload would go there in the clear
            raise SourceUnavailable(f"{self.place.host} leads to plain http, which is refused")
        if parts.hostname == self._home.hostname:
            return
        if not self._home.near and await _is_near(parts.hostname, proxy):
            raise self._refused(parts.hostname, False)

    async def _check_login(self, url: str, proxy: str) -> None:
        """A registry says where tokens are made; not in our own network, and not in the clear."""
        parts = urlsplit(url)
        host = self.place.host
        if parts.scheme not in ("https", "http") or not parts.hostname or parts.username:
            raise SourceUnavailable(f"{host} names no usable place for tokens")
        if parts.scheme == "http" and not self.place.plain:
            raise SourceUnavailable(f"{host} wants its token fetched over plain http, which is refused")
        if parts.hostname == self._home.hostname or parts.hostname in self._settings.token_hosts:
            return
        if parts.scheme == "http" and not is_loopback(self._home.hostname):  # one host was named insecure, not this one
            raise SourceUnavailable(f"{host} wants its token fetched over plain http, which is refused")
        if await _is_near(parts.hostname, proxy):
            raise self._refused(parts.hostname, True)

    def _refused(self, hostname: str, login: bool) -> SourceUnavailable:
        if not login:
            return SourceUnavailable(f"{self.place.host} leads to an address in your own network, which is refused")
        return SourceUnavailable(
            f"{self.place.host} wants its token fetched from your own network ({hostname}): refused",
            hint="A registry could steal your login, or reach your network, that way. If it is yours: "
            f'token_hosts = ["{hostname}"] in [sources] of config.toml.',
        )


async def _is_near(hostname: str, proxy: str) -> bool:
    """What can be told before connecting; for the rest the session's resolver looks."""
    near = literal(hostname)
    return bool(near) if near is not None or not proxy else await resolves_near(hostname)
