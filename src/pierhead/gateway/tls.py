"""The gateway's certificate: loaded again when its files change; a broken new one leaves the old in force."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from pierhead.config import GatewaySettings
from pierhead.errors import ConfigError

if TYPE_CHECKING:
    from ssl import SSLContext


class Certificate:
    """``context`` is what new connections are met with; ``problem`` is why newer files are not used ("": they are)."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._cert = settings.tls_cert
        self._key = settings.tls_key or settings.tls_cert
        self._client_ca = settings.tls_client_ca
        self.context: SSLContext | None = None
        self.problem = ""
        self._seen: tuple[object, ...] = ()

    def load(self) -> None:
        """Load the files for the first time, if there are to be any; ConfigError when they do not fit."""
        if self._cert:
            self._seen = self._stamp()
            self.context = self._read()

    def renew(self, *, force: bool = False) -> bool:
        """Load the files again if they have changed; whether there is a new context. Blocking."""
        if not self._cert:
            return False
        stamp = self._stamp()
        if stamp == self._seen and not force:
            return False
        self._seen = stamp
        try:
            self.context = self._read()
        except ConfigError as exc:
            self.problem = f"{exc.message}; the certificate before it stays in force"
            print(f"pierhead gateway: {self.problem}", file=sys.stderr, flush=True)  # noqa: T201
            return False
        self.problem = ""
        print("pierhead gateway: the certificate was loaded again", file=sys.stderr, flush=True)  # noqa: T201
        return True

    def _stamp(self) -> tuple[object, ...]:
        """What changes with the files, also where they are links that are moved."""
        seen: list[object] = []
        for path in (self._cert, self._key, self._client_ca):
            try:
                at = os.stat(path) if path else None
            except OSError as exc:
                seen.append(exc.errno)
                continue
            seen.append((at.st_ino, at.st_size, at.st_mtime_ns) if at is not None else None)
        return tuple(seen)

    def _read(self) -> SSLContext:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
            if self._client_ca:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as exc:  # SSLError is an OSError
            files = " and ".join(dict.fromkeys(filter(None, (self._cert, self._key, self._client_ca))))
            raise ConfigError(
                f"cannot use the certificate of {files}: {getattr(exc, 'strerror', None) or exc}",
                hint="gateway.tls_cert is the chain and gateway.tls_key its key without a password, both in PEM.",
            ) from exc
        return context


def _no_password() -> str:
    """Instead of a question on a terminal that nobody sits at."""
    raise ValueError("the key has a password")
