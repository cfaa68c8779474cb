"""Whether and how a request is served, from its head alone: host, origin, key, path, method; answers nothing."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any, NamedTuple

from pierhead.config import GatewaySettings
from pierhead.gateway import managing, peer
from pierhead.gateway.auth import Keys, given
from pierhead.gateway.faults import Fault
from pierhead.gateway.holder import Holder
from pierhead.gateway.operations import Dialect, Operation, dialect_of, place
from pierhead.gateway.stored import methods
from pierhead.gateway.tokens import Tokens, Unvetted, is_token
from pierhead.gateway.upload import MOST
from pierhead.gateway.wire import HOP_BY_HOP, Head

_PRIVATE = HOP_BY_HOP | {
    b"host",
    b"authorization",
    b"content-length",
    b"expect",
    b"accept-encoding",
    b"origin",
    b"cookie",
    b"x-request-id",
    b"x-api-key",
}
_VIA = (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip")  # set by proxies
_GIVEN = ("/metrics", "/openapi.json", "/v1/models", "/models", "/v2", "/v2/health/live", "/v2/health/ready")
_ID_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/+=")


class Door(NamedTuple):
    """What a listener demands: ``tcp`` is false for the unix socket, where file modes already decide."""

    address: str
    tcp: bool
    key: bool
    tls: bool = False


class Admitted(NamedTuple):
    """A request head and the verdict on it: ``fault``, ``local`` or a relay (to ``control``, or an ``operation``).

    ``forward`` is the head as the next one sees it, without its end; ``named`` is the model that the path names, and
    ``query`` what followed the path's question mark.
    ``timeout`` are the seconds that the client waits at most (0: it did not say).
    """

    method: str
    path: str
    forward: bytes
    request_id: bytes
    dialect: Dialect
    length: int | None
    chunked: bool
    http10: bool
    keep_alive: bool
    expect: bool
    holder: Holder | None = None
    unvetted: bytes = b""  # a token to verify before the verdict
    operation: Operation | None = None
    named: str = ""
    control: bool = False
    own: bool = False  # only for programs of this gateway's own user, as it came without a key
    local: str = ""
    fault: Fault | None = None
    cors: bytes = b""
    query: str = ""
    timeout: float = 0.0
    traceparent: str = ""  # where the gateway traces

    @property
    def key_id(self) -> str:
        """The id of the key that it came with; "" without one."""
        return self.holder.id if self.holder is not None else ""

    @property
    def asks(self) -> str:
        """The name of its operation; "" for none."""
        return self.operation.name if self.operation is not None else ""

    @property
    def reads_json(self) -> bool:
        """Whether the gateway reads members of its JSON body."""
        return self.operation is not None and self.operation.where == "body" and self.fault is None

    @property
    def pours(self) -> bool:
        """Whether its body goes to the daemon as it arrives."""
        return managing.pours(self.method, self.path)

    @property
    def sends_body(self) -> bool:
        """Whether a request of this method states its body's length even when that is 0."""
        return self.method in ("POST", "PUT", "PATCH")


def docker_path(path: str) -> str:
    """Docker Model Runner's spellings of a path (``/engines/v1/…``, ``/engines/llama.cpp/v1/…``) as ``/v1/…``."""
    if not path.startswith("/engines/"):
        return path
    rest = path[len("/engines") :]
    if rest.startswith("/v1/"):
        return rest
    backend, slash, tail = rest[1:].partition("/")
    return "/" + tail if backend and slash and tail.startswith("v1/") else path


class Doorkeeper:
    """Applies the settings to request heads; one per gateway, renewed with every snapshot's keys."""

    def __init__(self, settings: GatewaySettings, addresses: Iterable[str] = ()) -> None:
        self._settings = settings
        self.keys = Keys()
        self.tokens: Tokens | None = None
        self.tracing = False  # then a trace's header is ours to pass on
        self._hosts = {h.lower() for h in settings.allowed_hosts} | set(addresses)
        self._origins = set(settings.allowed_origins)

    def admit(self, head: Head, door: Door, local_ip: str) -> Admitted:
        """The verdict; a Fault is part of it, so that the caller can still read the body and keep the connection."""
        request = self._describe(head)
        try:
            limit = MOST if request.pours else self._settings.max_body
            if head.length is not None and head.length > limit:
                raise Fault(413, "body_too_large", f"the body has {head.length} bytes, the limit is {limit}.")
            self._check_host(head, door, local_ip)
            cors = self._check_origin(head)
            if cors:
                request = request._replace(cors=cors)
            if head.method == "OPTIONS" and cors and head.get(b"access-control-request-method"):
                return request._replace(local="preflight")
            return self._place(request, head, door)
        except Fault as fault:
            return request._replace(fault=fault)
        except Unvetted as exc:
            return request._replace(unvetted=exc.token)

    def _describe(self, head: Head) -> Admitted:
        given = head.get(b"x-request-id") or b""
        expect = head.get(b"expect")
        target = head.target.decode("ascii", "replace")
        fault = None
        if expect is not None and expect.lower() != b"100-continue":
            fault = Fault(417, "expectation_failed", "only 'Expect: 100-continue' is understood.")
        timeout = 0.0
        raw = head.get(b"x-request-timeout")
        if raw is not None:
            timeout = _seconds(raw)
            if timeout <= 0:
                fault = Fault(400, "bad_timeout", "the header x-request-timeout must be a number of seconds above 0.")
        path, _, query = target.partition("?")
        dialect = dialect_of(path)
        if path.startswith("/v1/models") and head.get(b"anthropic-version") is not None:
            dialect = "anthropic"
        return Admitted(
            method=head.method,
            path=path,
            forward=b"",
            request_id=given if 0 < len(given) <= 128 and _ID_BYTES.issuperset(given) else b"",
            dialect=dialect,
            length=head.length,
            chunked=head.chunked,
            http10=head.http10,
            keep_alive=head.keep_alive,
            expect=expect is not None and not head.http10,
            fault=fault,
            query=query,
            timeout=timeout,
            traceparent=(head.get(b"traceparent") or b"").decode("latin-1") if self.tracing else "",
        )

    def _who(self, head: Head) -> Holder:
        """Whose key or token the request has; Fault 401, or Unvetted."""
        if self.tokens is not None:
            secret = given(head)
            if secret is not None and is_token(secret):
                return self.tokens.find(secret)
        return self.keys.check(head)

    def _check_host(self, head: Head, door: Door, local_ip: str) -> None:
        """Refuse names that are not ours: a page that rebinds its own name to this address sends that name."""
        given = head.get(b"host")
        if not door.tcp or given is None:
            return
        host = host_of(given.decode("latin-1"))
        if host in self._hosts or (local_ip and _same_ip(host, local_ip)):
            return
        raise Fault(
            421,
            "host_not_allowed",
            f"this gateway does not answer for the host '{host[:200]}'.",
            hint="Add it to gateway.allowed_hosts in the settings.",
        )

    def _check_origin(self, head: Head) -> bytes:
        raw = head.get(b"origin")
        if raw is None:
            return b""
        origin = raw.decode("latin-1")
        own = (head.get(b"host") or b"").decode("latin-1")
        if origin in (f"http://{own}", f"https://{own}"):
            return b""
        if origin in self._origins or "*" in self._origins:
            return b"access-control-allow-origin: %b\r\nvary: origin\r\n" % raw
        raise Fault(
            403,
            "origin_not_allowed",
            f"pages from '{origin[:200]}' may not use this gateway.",
            hint="Add it to gateway.allowed_origins in the settings.",
        )

    def _place(self, request: Admitted, head: Head, door: Door) -> Admitted:
        path = docker_path(request.path)
        method = request.method
        if path in ("/health", "/ready", "/"):
            return _only(request, ("GET", "HEAD"), local=path[1:] or "root")
        found = place(path)
        control = found is None and path.startswith("/api/")
        managed = managing.kind(method, path) if control else ""
        if door.tcp and (door.key or (control and not managed)):
            request = request._replace(holder=self._who(head))
        elif door.tcp and (self.keys or self.tokens is not None) and given(head):
            # Here none is needed, but whoever sends one means it: with a revoked or mistyped one it is nobody else.
            request = request._replace(holder=self._who(head))
        if request.fault is not None:
            return request
        if control:
            scope = managing.scope(request.holder, managed) if request.holder is not None else b""
            own = managed == "change" and self._own(request, head, door)
            forward = self._forward(head, head.target) + scope
            return request._replace(control=True, own=own, forward=forward)
        if found is not None:
            operation, named = found
            target = operation.path.encode() if not named else head.target
            forward = self._forward(head, target, json=operation.where == "body")
            return _only(request, ("POST",), forward=forward, operation=operation, named=named)
        known = _local(path)
        if known:
            if request.holder is not None:
                _may_read(request.holder, path)
            return _only(request, known, local=path, own=_changes(path) and self._own(request, head, door))
        shown = request.path[:200]
        raise Fault(
            404,
            "unknown_url",
            f"there is nothing at {method} {shown}.",
            hint="The API begins at /v1; /openapi.json describes it.",
        )

    def _own(self, request: Admitted, head: Head, door: Door) -> bool:
        """Whether only this gateway's own user may ask this, as it came without a key; Fault through a proxy."""
        own = door.tcp and request.holder is None
        if own and any(head.get(name) is not None for name in _VIA):
            raise peer.refused()
        return own

    def _forward(self, head: Head, target: bytes, *, json: bool = False) -> bytes:
        """The head as the engine sees it: no keys, no cookies, no hop-by-hop headers; framing and id come later.

        A body that can only be ``json`` is called so, whatever the client calls it: some engines mind.
        """
        lines = [b"%b %b HTTP/1.1\r\nhost: localhost\r\n" % (head.method.encode(), target)]
        if json:
            lines.append(b"content-type: application/json\r\n")
        for name, value in head.headers:
            # Some servers take Content_Length for Content-Length: what is kept back is kept back in this spelling too.
            if name.replace(b"_", b"-") in _PRIVATE or name in head.dropped or (json and name == b"content-type"):
                continue
            if not (self.tracing and name == b"traceparent"):
                lines.append(name + b": " + value + b"\r\n")
        return b"".join(lines)


def _local(path: str) -> tuple[str, ...]:
    """The methods of a path that the gateway answers by itself; none for other paths."""
    if path.startswith(("/v1/responses/", "/v1/conversations")):
        return methods(path)
    if path == "/v2/repository/index" or _changes(path):
        return ("POST",)
    return ("GET", "HEAD") if path in _GIVEN or path.startswith(("/v1/models/", "/models/", "/v2/models/")) else ()


def _changes(path: str) -> bool:
    """Whether a local path changes what is loaded, which concerns everybody."""
    return path.startswith("/v2/repository/models/") and path.endswith(("/load", "/unload"))


def _may_read(holder: Holder, path: str) -> None:
    """Fault 403 when the key's scopes do not cover what the gateway answers at a path."""
    if path == "/metrics":
        holder.require_all()
    elif path.startswith(("/v1/responses/", "/v1/conversations")):
        holder.require_dialect("openai")
    elif path.startswith("/v2/models/") or path == "/v2/repository/index":
        holder.require_dialect("kserve")
    elif _changes(path):
        holder.require_admin()


def _seconds(raw: bytes) -> float:
    """A decimal number of seconds; 0 for anything else."""
    whole, dot, part = raw.partition(b".")
    digits = (whole + part).isdigit() and bool(whole) and len(raw) < 16 and (not dot or bool(part))
    return float(raw) if digits else 0.0


def _only(request: Admitted, methods: tuple[str, ...], **changes: Any) -> Admitted:
    if request.method not in methods:
        allow = ", ".join(methods)
        raise Fault(
            405,
            "method_not_allowed",
            f"{request.path[:200]} answers {allow} only.",
            headers=((b"allow", allow.encode()),),
        )
    return request._replace(**changes)


def host_of(text: str) -> str:
    """The host of a Host header, lower case, without its port; ``[::1]`` keeps its brackets."""
    text = text.strip().lower()
    if text.startswith("["):
        return text.partition("]")[0] + "]"
    return text.partition(":")[0].removesuffix(".")


def _same_ip(host: str, local: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")) == ipaddress.ip_address(local.partition("%")[0])
    except ValueError:
        return False
