"""What a provider's base URL says, and whether a key may be sent there; resolves no name."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from pierhead.errors import ConfigError


@dataclass(frozen=True)
class Address:
    """Where a provider is; ``path`` has no slash at its end."""

    host: str
    port: int
    tls: bool
    path: str


def address(url: str, *, allow_http: bool, at: str) -> Address:
    """What a base URL says; ConfigError for one that a key must not be sent to."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as exc:
        raise ConfigError(f"{at} is no URL: {exc}", hint="Try https://api.example.com/v1.") from exc
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{at} must begin with https:// and name a host", hint="Try https://api.example.com/v1.")
    if parts.username is not None or parts.query or parts.fragment or not url.isascii() or not url.isprintable():
        raise ConfigError(f"{at} may have a host, a port and a path only", hint="A key belongs into `secret`.")
    if any(c in ' <>"{}|\\^`' for c in url):
        raise ConfigError(f"{at} has signs that no URL has", hint="Try https://api.example.com/v1.")
    if parts.scheme == "http" and not _loopback(host):
        if not allow_http:
            raise ConfigError(
                f"{at}: without TLS everybody on the way reads key and prompts",
                hint="Use https://; or, in a network of your own, set allow_http = true.",
            )
        if _public(host):
            raise ConfigError(f"{at}: {host} is on the public network, which is never spoken to without TLS")
    tls = parts.scheme == "https"
    return Address(host, port or (443 if tls else 80), tls, parts.path.rstrip("/"))


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _public(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False  # a name: what it resolves to is the administrator's word
