"""A provider as the gateway's upstream: the head it gets, its TLS, and what of its answers and errors clients may see.

The client's own credentials, cookies and other headers never reach it; its cookies and account data never reach a
client. It is no router: which provider answers is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import functools
import os
import ssl
from typing import TYPE_CHECKING, Any

from pierhead import __version__
from pierhead.gateway.faults import Fault, from_engine
from pierhead.gateway.link import Remote
from pierhead.gateway.operations import Operation
from pierhead.gateway.wire import BadMessage, Head

if TYPE_CHECKING:
    from collections.abc import Callable

_SENT = {
    "openai": ("content-type", "accept", "openai-beta"),
    "anthropic": ("content-type", "accept", "anthropic-version", "anthropic-beta"),
}
PASSED = frozenset({b"content-type", b"retry-after", b"cache-control"})
_TIMEOUT = 10.0  # seconds for name, connection and handshake together
_TOKEN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.~+/=*")
_TOO_LONG = ("prompt is too long", "maximum context length", "context window", "exceed context limit")


@functools.lru_cache(maxsize=16)
def _context(ca_file: str, changed: int) -> ssl.SSLContext:
    """Certificates and names are always verified; loading the authorities takes tens of milliseconds."""
    context = ssl.create_default_context()
    if ca_file:
        context.load_verify_locations(ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load(ca_file: str) -> ssl.SSLContext:
    return _context(ca_file, os.stat(ca_file).st_mtime_ns if ca_file else 0)


class Outside:
    """One provider; ``timeout`` are seconds to the first byte of an answer (0: no bound of its own)."""

    def __init__(self, remote: Remote) -> None:
        self.provider = remote.provider
        self.timeout = remote.timeout
        self._remote = remote
        host = f"[{remote.host}]" if ":" in remote.host else remote.host
        port = "" if remote.port == (443 if remote.tls else 80) else f":{remote.port}"
        own = {"host": host + port, "user-agent": f"pierhead/{__version__}", "accept-encoding": "identity"}
        own |= dict(remote.headers)
        self._defaults = {} if "anthropic-version" in own else {"anthropic-version": "2023-06-01"}
        if remote.dialect != "anthropic":
            self._defaults = {}
        secret = b""
        if remote.credential is not None:
            own[remote.credential.header] = remote.credential.value
            secret = remote.credential.value.rpartition(" ")[2].encode("latin-1")
        self._secret = secret
        self._sent = frozenset(_SENT[remote.dialect]) - own.keys()
        self._own = "".join(f"{name}: {value}\r\n" for name, value in own.items()).encode("latin-1")

    def __repr__(self) -> str:
        return f"Outside({self.provider!r})"

    # --- what it gets -------------------------------------------------------------------------------------------------

    def head(self, operation: Operation, forward: bytes = b"") -> bytes:
        """The head of a request without its end; ``forward`` is the head that an engine would get."""
        path = self._remote.path + operation.path.removeprefix("/v1")
        lines = [f"POST {path} HTTP/1.1\r\n".encode("latin-1"), self._own]
        missing = dict(self._defaults)
        for line in forward.split(b"\r\n")[1:]:
            name, _, _ = line.partition(b":")
            if name and (text := name.decode("latin-1")) in self._sent:
                lines += (line, b"\r\n")
                missing.pop(text, None)
        if not forward:
            missing["content-type"] = "application/json"
        lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in missing.items()]
        return b"".join(lines)

    async def connect(self, make: Callable[[], Any]) -> Any:
        """A connection, encrypted and verified unless the administrator said otherwise; Fault when there is none."""
        remote, loop = self._remote, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_TIMEOUT):
                context = await self._tls() if remote.tls else None
                name = remote.host if context is not None else None
                made = await loop.create_connection(make, remote.host, remote.port, ssl=context, server_hostname=name)
                return made[1]
        except ssl.SSLCertVerificationError as exc:
            raise self._unreachable(
                f"its certificate does not hold ({exc.verify_message})", "Trust its authority with ca_file, if you do."
            ) from exc
        except ssl.SSLError as exc:
            raise self._unreachable(f"TLS failed ({exc.reason or 'handshake'})") from exc
        except TimeoutError as exc:
            raise self._unreachable(f"no connection within {_TIMEOUT:g} s", status=504) from exc
        except OSError as exc:
            raise self._unreachable(
                os.strerror(exc.errno) if exc.errno and exc.errno > 0 else "its name is not known"
            ) from exc

    async def _tls(self) -> ssl.SSLContext:
        file = self._remote.ca_file
        try:
            return await asyncio.to_thread(_load, file)
        except OSError as exc:  # an SSLError is one
            raise self._unreachable(f"its ca_file {file} cannot be used ({exc.strerror or 'no certificates'})") from exc

    def _unreachable(self, why: str, hint: str = "", status: int = 502) -> Fault:
        text = f"the provider '{self.provider}' cannot be reached: {why}."
        return Fault(status, "provider_unreachable", text, source="provider", hint=hint or None)

    # --- what it says -------------------------------------------------------------------------------------------------

    def fault(self, status: int, body: bytes, head: Head | None = None) -> Fault:
        """Its error in our words: about its account nothing but that it refuses, and no key in any text."""
        found = from_engine(status, self._scrubbed(body))
        found.source = "provider"
        name = self.provider
        if status in (401, 402, 403):
            return Fault(
                502,
                "provider_denied",
                f"the provider '{name}' refuses the gateway's key (status {status}).",
                source="provider",
                hint="Whoever runs the gateway can look at its secret: pier route check",
            )
        if status == 404:
            found.status, found.type, found.code = 502, "server_error", "provider_not_found"
            found.message = f"the provider '{name}' does not know the model, or has no such API: {found.message}"
        elif status == 429:
            found.code = found.code if found.code != "invalid_request" else "rate_limit_exceeded"
        elif status in (408, 504):
            found.status, found.type, found.code = 504, "server_error", "provider_timeout"
        elif status == 529:
            found.status, found.type, found.code = 503, "server_error", "provider_overloaded"
        elif status >= 500:
            found.status, found.type = (503 if status == 503 else 502), "server_error"
        elif any(words in found.message.lower() for words in _TOO_LONG):
            found.code = "context_length_exceeded"
        wait = head.get(b"retry-after") if head is not None else None
        if wait is not None and len(wait) <= 64 and found.status in (429, 503):
            found.headers = ((b"retry-after", wait),)
        return found

    def _scrubbed(self, body: bytes) -> bytes:
        """``body`` without the key, and without what begins like it: some providers repeat a part of it."""
        secret = self._secret
        if len(secret) < 8:
            return body
        start = secret[: max(8, len(secret) // 3)]
        at = body.find(start)
        while at >= 0:
            end = at
            while end < len(body) and body[end] in _TOKEN:
                end += 1
            body = body[:at] + b"***" + body[max(end, at + len(start)) :]
            at = body.find(start, at)
        return body


def answer_header(name: bytes, value: bytes) -> bool:
    """Whether a client gets this header of a provider's answer; BadMessage when the answer could not be read then."""
    if name == b"content-encoding" and value.lower() != b"identity":
        raise BadMessage("its body is compressed, which was not asked for")
    return name in PASSED


def answer_status(status: int) -> None:
    """BadMessage for a redirect: the key is sent where the administrator said and nowhere else."""
    if 300 <= status < 400:
        raise BadMessage("it redirects, which is not followed")
