"""Bearer tokens of an OpenID provider instead of keys: verified once, remembered until they end; speaks no HTTP itself.

Only asymmetric algorithms count, and only keys that the provider publishes: what a token says about itself chooses
among them and nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any, cast

import msgspec

from pierhead.config import GatewaySettings
from pierhead.errors import ConfigError, UsageError
from pierhead.gateway.budgets import Budgets
from pierhead.gateway.faults import Fault
from pierhead.gateway.grants import Wanted, grants
from pierhead.gateway.holder import Holder
from pierhead.gateway.issuer import Issuer, fetchable, refused
from pierhead.gateway.link import Grants, Key

_REMEMBERED = 4096  # tokens
_HOLDERS = 10000
_NO = 5.0  # seconds for which a token that did not hold is not looked at again
_LONGEST = 8192
_NUMBERS = ("rpm", "tpm", "concurrent", "priority")
_LISTS = ("models", "dialects", "budgets")
_FLAGS = ("admin", "cache")


def is_token(secret: bytes) -> bool:
    """Whether a secret has the shape of a signed token rather than of a key."""
    return secret.startswith(b"ey") and secret.count(b".") == 2


class Unvetted(Exception):
    """A token that was not verified yet; ``Tokens.vet`` does it."""

    def __init__(self, token: bytes) -> None:
        super().__init__("unvetted")
        self.token = token


class Tokens:
    """Whose tokens are accepted; one per gateway."""

    def __init__(self, settings: GatewaySettings, room: Budgets) -> None:
        self._issuer = Issuer(settings.oidc_issuer, settings.oidc_audience)
        self._claims = settings.oidc_claims
        self._room = room
        self._known: dict[bytes, tuple[Holder | Fault, float]] = {}
        self._holders: dict[tuple[str, Grants], Holder] = {}
        self._next = 0.0
        try:
            self._base = grants(msgspec.convert(settings.oidc_grants, Wanted))
        except (msgspec.ValidationError, UsageError) as exc:
            raise ConfigError(
                f"gateway.oidc_grants is not right: {exc}",
                hint='Write for example { rpm = 60, budgets = ["5usd/month"] }.',
            ) from exc

    def find(self, token: bytes) -> Holder:
        """Whose token this is; Fault 401 when it does not hold, Unvetted when that is not known yet."""
        if len(token) > _LONGEST:
            raise refused("it is too long")
        found = self._known.get(_name(token))
        if found is None or found[1] <= time.time():
            raise Unvetted(token)
        if isinstance(found[0], Fault):
            raise found[0]
        return found[0]

    async def vet(self, token: bytes) -> None:
        """Verify a token, so that ``find`` knows; raises nothing."""
        until = time.time() + _NO
        try:
            claims = await self._issuer.verify(token.decode("ascii", "replace"))
            verdict: Holder | Fault = await asyncio.to_thread(self._holder, claims)
            until = max(until, float(claims["exp"]))
        except Fault as fault:
            verdict = fault
        while len(self._known) >= _REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[_name(token)] = verdict, until
        if isinstance(verdict, Holder):
            self._next = min(self._next or until, until)

    def lapsed(self, now: float) -> bool:
        """Whether a token has ended since the last call: what connections remember of its head holds no more."""
        if not self._next or now < self._next:
            return False
        self._known = {name: found for name, found in self._known.items() if found[1] > now}
        self._next = min((until for verdict, until in self._known.values() if isinstance(verdict, Holder)), default=0.0)
        return True

    def _holder(self, claims: dict[str, Any]) -> Holder:
        """Tokens of one subject that may do the same share their counters; those of one subject share its budgets."""
        who = str(claims.get("sub"))
        if len(who) > 100 or not who.isprintable():
            who = hashlib.sha256(who.encode("utf-8", "replace")).hexdigest()
        given = self._grants(claims)
        holder = self._holders.get((who, given))
        if holder is None:
            if len(self._holders) >= _HOLDERS:
                for name in [name for name, old in self._holders.items() if not old.open][: _HOLDERS // 10]:
                    del self._holders[name]
            holder = self._holders[who, given] = Holder(Key(f"oidc:{who}", "", grants=given), self._room)
        return holder

    def _grants(self, claims: dict[str, Any]) -> Grants:
        wanted = {name: _read(name, path, claims) for name, path in self._claims.items()}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        for name in ("models", "dialects"):  # for a key no scope means everything; a claim that names nothing does not
            if name in wanted and not wanted[name]:
                raise Fault(403, "unusable_claims", f"the token may use no {name}: its claim names none.")
        try:
            return grants(msgspec.convert(wanted, Wanted, strict=False), self._base)
        except (msgspec.ValidationError, UsageError) as exc:
            raise Fault(403, "unusable_claims", f"what the token says of its rights is not usable: {exc}.") from exc


def _name(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _read(name: str, path: str, claims: dict[str, Any]) -> Any:
    """The claim at ``a.b``; ``a.b=word`` asks whether the claim is, or has, that word."""
    path, asks, word = path.partition("=")
    value: Any = claims
    for step in [path] if path in claims else path.split("."):
        value = cast("dict[str, Any]", value).get(step) if isinstance(value, dict) else None
    if asks:
        words = value.split() if isinstance(value, str) else value
        return isinstance(words, list) and word in words
    if value is not None and name in _LISTS and isinstance(value, str):
        return value.split()
    return value


def check_settings(settings: GatewaySettings) -> None:
    """ConfigError for settings of a provider that cannot work, or are not safe."""
    if not settings.oidc_issuer:
        return
    if not fetchable(settings.oidc_issuer):
        raise ConfigError(
            f"gateway.oidc_issuer '{settings.oidc_issuer}' is no https address",
            hint="Write https://…, as in its tokens.",
        )
    if not settings.oidc_audience:
        raise ConfigError(
            "gateway.oidc_issuer needs gateway.oidc_audience", hint="It is the name by which tokens mean this gateway."
        )
    unknown = set(settings.oidc_claims) - {*_NUMBERS, *_LISTS, *_FLAGS}
    if unknown:
        raise ConfigError(
            f"gateway.oidc_claims knows no '{min(unknown)}'",
            hint=f"It knows: {', '.join((*_LISTS, *_NUMBERS, *_FLAGS))}.",
        )
    import importlib.util

    if not all(importlib.util.find_spec(name) for name in ("jwt", "cryptography")):
        raise ConfigError("tokens need PyJWT with cryptography", hint="pip install 'pierhead[oidc]'")
