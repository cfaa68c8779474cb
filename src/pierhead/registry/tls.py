"""Certificates that a network trusts beyond the system's: a file of authorities, and Docker's certs.d folders."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pierhead.config import SourceSettings
from pierhead.errors import ConfigError
from pierhead.registry.places import is_host
from pierhead.registry.wire import load_authority, new_context


def certificate_folders() -> tuple[Path, ...]:
    """Where Docker and Podman look: the machine's folders, then the user's."""
    home = Path("~").expanduser()
    return (
        Path("/etc/docker/certs.d"),
        Path("/etc/containers/certs.d"),
        home / ".docker" / "certs.d",
        home / ".config" / "containers" / "certs.d",
    )


class Trust:
    """One context for each host: ``HOST[:PORT]`` below ``folders`` holds ``*.crt``, and ``*.cert`` beside ``*.key``."""

    def __init__(self, settings: SourceSettings, folders: Sequence[Path] | None = None) -> None:
        self._ca_file = settings.ca_file
        self._folders = certificate_folders() if folders is None else folders
        self._made: dict[str, ssl.SSLContext] = {}

    def known(self, url: str) -> ssl.SSLContext | None:
        """The context, if it is made."""
        return self._made.get(urlsplit(url).netloc)

    def context(self, url: str) -> ssl.SSLContext:
        """The context for an https address; reads files. ConfigError for certificates that cannot be used."""
        key = urlsplit(url).netloc
        if key not in self._made:
            self._made[key] = self._make(url)
        return self._made[key]

    def _make(self, url: str) -> ssl.SSLContext:
        context = new_context(self._ca_file)
        for folder in self._folders:
            for name in _names(url):
                _load_folder(context, folder / name)
        return context


def _names(url: str) -> list[str]:
    """The folder names of an address: with its port, and without where the port is the usual one."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    found = [f"{host}:{parts.port or 443}", *([host] if parts.port in (None, 443) else [])]
    return [name for name in found if is_host(name)]


def _load_folder(context: ssl.SSLContext, folder: Path) -> None:
    try:
        files = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as exc:
        raise ConfigError(f"cannot read {folder}: {exc.strerror}", hint="Check who may read that folder.") from exc
    for file in files:
        if file.suffix == ".crt":
            load_authority(context, file)
        elif file.suffix == ".cert":
            _load_pair(context, file, file.with_suffix(".key"))


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    if not key.exists():
        raise ConfigError(f"the client certificate {certificate} has no key beside it", hint=f"Put it at {key}.")
    try:
        context.load_cert_chain(certificate, key, password="")  # an encrypted key must fail, not ask the terminal
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(
            f"cannot use the client certificate {certificate} with {key.name}",
            hint="Both must be readable PEM files that belong together; the key without a passphrase.",
        ) from exc
