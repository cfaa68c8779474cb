"""Where a registry is asked: its own address and those of its mirrors, with TLS or without; pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from pierhead.config import SourceSettings
from pierhead.errors import ConfigError
from pierhead.registry.name import HUB
from pierhead.registry.wire import is_loopback

_HOST = re.compile(
    r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*|\[[0-9a-f:.]+\])(?::\d{1,5})?"
)


@dataclass(frozen=True)
class Place:
    """``host`` is the name that logins and certificates are kept under, ``base`` the address that is asked."""

    host: str
    base: str
    mirror: bool = False

    @property
    def hostname(self) -> str:
        return urlsplit(self.base).hostname or ""

    @property
    def plain(self) -> bool:
        """Whether it is asked without TLS."""
        return self.base.startswith("http:")


def is_host(text: str) -> bool:
    """Whether a text is ``host`` or ``host:port``, and fit to be part of a path."""
    return _HOST.fullmatch(text) is not None


def own_place(host: str, settings: SourceSettings) -> Place:
    """The registry itself: TLS unless it is on loopback or named in ``insecure_registries``."""
    address = "registry-1.docker.io" if host == HUB else host
    return Place(host, f"{_scheme(host, settings)}://{address}")


def mirror_places(host: str, settings: SourceSettings) -> tuple[Place, ...]:
    """The mirrors of a registry in the order in which they are tried; ConfigError for one that is no address."""
    return tuple(_mirror(text, settings) for text in settings.mirrors.get(host, ()))


def _mirror(text: str, settings: SourceSettings) -> Place:
    bare = text.rstrip("/")
    full = bare if "://" in bare else f"{_scheme(bare, settings)}://{bare}"
    parts = urlsplit(full)
    if parts.scheme not in ("https", "http") or not is_host(parts.netloc) or parts.query or parts.fragment:
        raise ConfigError(
            f"not the address of a mirror: {text.rpartition('@')[2][:120]!r}",
            hint='Write mirrors = {"docker.io" = ["https://mirror.example"]} in [sources] of config.toml; '
            "`pier login` keeps its login.",
        )
    return Place(parts.netloc, full, mirror=True)


def _scheme(host: str, settings: SourceSettings) -> str:
    name = urlsplit(f"//{host}").hostname or ""
    return "http" if is_loopback(name) or host in settings.insecure_registries else "https"
