"""Which addresses a registry may lead to: what a name resolves to is looked at, then that very address connected to."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from aiohttp.abc import AbstractResolver, ResolveResult

from pierhead.registry.wire import is_loopback, is_private


class Refused(OSError):
    """A name leads to an address that only machines nearby reach, for somebody who may not send us there."""


class Home:
    """The registry's own host name; ``near`` once it is known whether it is in the user's own network."""

    def __init__(self, hostname: str) -> None:
        self.hostname = hostname
        self.near: bool | None = literal(hostname)


class Guard(AbstractResolver):
    """A resolver that refuses names which lead nearby. What it answers is what gets connected to, so there is no gap.

    A registry in the user's own network may lead to others there (its storage); with ``strict`` (whoever makes tokens,
    to whom logins are sent) not even that one may. ``trusted`` names were chosen by the user: proxies, token hosts.
    """

    def __init__(self, home: Home, trusted: frozenset[str], inner: AbstractResolver, *, strict: bool) -> None:
        self._home = home
        self._trusted = trusted
        self._inner = inner
        self._strict = strict

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        near = any(is_private(entry["host"]) for entry in found)
        if host == self._home.hostname:
            if self._home.near is None:
                self._home.near = near
            elif near and not self._home.near:  # it was somewhere else a moment ago
                raise Refused(host)
        elif near and host not in self._trusted and (self._strict or not self._home.near):
            raise Refused(host)
        return found

    async def close(self) -> None:
        await self._inner.close()


def literal(host: str) -> bool | None:
    """Whether an address that is written out is near; None for a name that has to be resolved."""
    if is_loopback(host):
        return True
    try:
        return is_private(host)
    except ValueError:
        return None


async def resolves_near(host: str) -> bool:
    """A look at a name that a proxy will resolve: refused where this machine, too, finds it nearby."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return any(is_private(str(entry[4][0])) for entry in found)


def proxy_for(url: str, env: Mapping[str, str] | None = None) -> str:
    """The proxy of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY) for an address; empty where NO_PROXY names it.

    NO_PROXY knows names, their endings, ports, ``*`` and networks (10.0.0.0/8). Loopback never goes through a proxy.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    env = os.environ if env is None else env
    proxies = getproxies_environment() if env is os.environ else _proxies(env)
    found = proxies.get(parts.scheme) or proxies.get("all", "")
    if not found or is_loopback(host) or _in_networks(host, proxies.get("no", "")):
        return ""
    bypass = proxy_bypass(parts.netloc.rpartition("@")[2], proxies)
    return "" if bypass else (found if "://" in found else f"http://{found}")


def proxy_hosts(env: Mapping[str, str] | None = None) -> frozenset[str]:
    """The names of the environment's proxies: the user chose them, wherever they are."""
    proxies = getproxies_environment() if env is None else _proxies(env)
    texts = (v if "://" in v else f"http://{v}" for k, v in proxies.items() if k != "no")
    return frozenset(urlsplit(text).hostname or "" for text in texts)


def _proxies(env: Mapping[str, str]) -> dict[str, str]:
    return {k.lower().removesuffix("_proxy"): v for k, v in env.items() if v and k.lower().endswith("_proxy")}


def _in_networks(host: str, listed: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for text in listed.split(","):
        try:
            if address in ipaddress.ip_network(text.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False
