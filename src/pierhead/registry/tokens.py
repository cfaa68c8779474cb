"""What a registry is shown to let us in: its challenges answered with the login that is kept, one at a time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

import aiohttp
import msgspec

from pierhead.errors import AccessDenied, CorruptData, SourceUnavailable
from pierhead.registry.connections import Connections
from pierhead.registry.credentials import Login
from pierhead.registry.wire import TRANSIENT, Again, redact, retry_after

MAX_TOKEN = 1 << 20
CLIENT = "pierhead"
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    refresh_token: str = ""


class Tokens:
    """The ``Authorization`` of each scope; ``refresh`` is a token to be kept instead of the password, if one was made.

    With ``offline`` such a token is asked for.
    """

    def __init__(self, connections: Connections, login: Login, *, offline: bool = False) -> None:
        self._connections = connections
        self._host = connections.place.host
        self._login = login
        self._offline = offline
        self._held: dict[str, str] = {}
        self._one = asyncio.Lock()
        self.refresh = ""

    def header(self, scope: str) -> str:
        """What to send now; empty before the first challenge."""
        return self._held.get(scope, "")

    async def renew(self, scope: str, used: str, challenges: Sequence[str]) -> None:
        """``used`` was not accepted: get another, once for all who wait. AccessDenied where that cannot be done."""
        async with self._one:
            if self._held.get(scope, "") != used:
                return  # somebody else has renewed it meanwhile
            self._held.pop(scope, None)
            made = await self._answer(challenges, scope)
            if made == used:
                raise self.denied()
            self._held[scope] = made

    async def _answer(self, challenges: Sequence[str], scope: str) -> str:
        for text in challenges:
            kind, _, rest = text.strip().partition(" ")
            if kind.lower() == "bearer":
                return "Bearer " + await self._token(dict(_PARAMETER.findall(rest)), scope)
            if kind.lower() == "basic" and self._login.user and not self._login.identity_token:
                return self._login.basic
        raise self.denied()

    def denied(self) -> AccessDenied:
        """The error for a login that is missing or wrong."""
        hint = f"Type `pier login {self._host}`."
        if self._login:
            return AccessDenied(f"{self._host} does not accept the login that is kept for it", hint=hint)
        return AccessDenied(f"{self._host} wants a login", hint=hint)

    async def _token(self, given: Mapping[str, str], scope: str) -> str:
        realm = given.get("realm", "")
        wanted = {"service": given["service"]} if given.get("service") else {}
        if given.get("scope") or scope:
            wanted["scope"] = given.get("scope") or scope
        where = redact(realm)
        try:
            made = await self._ask(realm, wanted, where)
        except (aiohttp.ClientError, TimeoutError) as exc:
            if isinstance(exc, aiohttp.ClientSSLError):
                raise
            raise Again(SourceUnavailable(f"cannot get a token from {where}", hint="Try again later.")) from exc
        token = made.token or made.access_token
        if not token or not token.isascii() or not token.isprintable():
            raise SourceUnavailable(f"{where} does not answer with a token")
        self.refresh = made.refresh_token or self.refresh
        return token

    async def _ask(self, realm: str, wanted: dict[str, str], where: str) -> _Token:
        method, url, headers, form = self._request(realm, wanted)
        async with self._connections.send(method, url, headers=headers, data=form, login=True) as response:
            if response.status in (400, 401, 403):
                raise self.denied()
            if response.status in TRANSIENT:
                raise Again(SourceUnavailable(f"{where} answers {response.status}"), retry_after(response.headers))
            if response.status != 200:
                raise SourceUnavailable(f"{where} answers {response.status} instead of a token")
            body = await limited(response, MAX_TOKEN, where)
        try:
            return msgspec.json.decode(body, type=_Token)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise SourceUnavailable(f"{where} does not answer with a token") from exc

    def _request(self, realm: str, wanted: dict[str, str]) -> tuple[str, str, dict[str, str], dict[str, str] | None]:
        if self._login.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": self._login.identity_token, "client_id": CLIENT}
            return "POST", realm, {}, {**form, **wanted}
        headers = {"Authorization": self._login.basic} if self._login.user else {}
        if self._offline:
            wanted = {**wanted, "account": self._login.user, "client_id": CLIENT, "offline_token": "true"}
        mark = "&" if "?" in realm else "?"
        return "GET", f"{realm}{mark}{urlencode(wanted)}", headers, None


async def limited(response: aiohttp.ClientResponse, limit: int, where: str) -> bytes:
    """The whole body; CorruptData when it is longer than it may be."""
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > limit:
            raise CorruptData(f"{where} answers with more than {limit} bytes")
    return bytes(data)
