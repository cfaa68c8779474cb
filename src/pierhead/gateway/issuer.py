"""An OpenID provider: its keys, found and fetched again when they change, and what its tokens claim; grants nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import time
import urllib.request
from http.client import HTTPException
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from pierhead.gateway.faults import Fault

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_FAMILIES = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
_LEEWAY = 30  # seconds by which clocks may differ
_AGE = 3600.0  # seconds after which keys are fetched again
_PAUSE = 15.0  # seconds between two fetches, whatever tokens say
_TIMEOUT = 10.0
_MOST = 1 << 20
_CHALLENGE = ((b"www-authenticate", b'Bearer realm="pierhead", error="invalid_token"'),)


def refused(why: str) -> Fault:
    """A token that does not hold."""
    return Fault(401, "invalid_token", f"the bearer token does not hold: {why}.", headers=_CHALLENGE)


def fetchable(url: str) -> bool:
    """Whether an address is one that a provider's keys may come from: https, or this machine's own."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        return bool(parts.hostname)
    if parts.scheme != "http" or not parts.hostname:
        return False
    try:
        return parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        return False


class _Stay(urllib.request.HTTPRedirectHandler):
    """A provider's documents are where they are said to be."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def fetch(url: str) -> Any:
    """A JSON document; OSError or ValueError when there is none. Blocking."""
    if not fetchable(url):
        raise ValueError(f"{url} is no https address")
    opener = urllib.request.build_opener(_Stay)
    with opener.open(url, timeout=_TIMEOUT) as answer:  # its scheme is checked above
        raw = answer.read(_MOST + 1)
    if len(raw) > _MOST:
        raise ValueError(f"{url} is too long")
    return msgspec.json.decode(raw)


class Issuer:
    """One provider; its keys are fetched when a token first needs them."""

    def __init__(self, issuer: str, audience: str) -> None:
        self._issuer = issuer
        self._audience = audience
        self._keys: dict[str, Any] = {}  # by kid, "" where there is none
        self._fetched = self._tried = float("-inf")
        self._fetching = asyncio.Lock()

    async def verify(self, token: str) -> dict[str, Any]:
        """The claims of a token that holds; Fault 401 says why not, 503 that the provider does not answer."""
        import jwt

        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError) as exc:
            raise refused("it is no signed token") from exc
        algorithm, kid = str(header.get("alg")), str(header.get("kid") or "")
        if algorithm not in ALGORITHMS:
            raise refused(f"it is not signed with one of {', '.join(ALGORITHMS)}")
        if "crit" in header:
            raise refused("it has extensions that are not understood")
        key = self._choose(kid, algorithm)
        if key is None or time.monotonic() - self._fetched > _AGE:
            await self._refresh(needed=key is None)
            key = self._choose(kid, algorithm)
        if key is None:
            raise refused("its provider publishes no such key")
        return await asyncio.to_thread(self._claims, token, key, algorithm)

    def _choose(self, kid: str, algorithm: str) -> Any:
        """The published key that a token of this algorithm must be signed with."""
        if kid:
            named = self._keys.get(kid)
            return named if named is not None and _fits(named, algorithm) else None
        fitting = [key for key in self._keys.values() if _fits(key, algorithm)]
        return fitting[0] if len(fitting) == 1 else None

    def _claims(self, token: str, raw: dict[str, Any], algorithm: str) -> dict[str, Any]:
        import jwt

        try:
            key = jwt.PyJWK(raw, algorithm)
            return jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=_LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as exc:
            raise refused(str(exc).rstrip(".") or "its signature is wrong") from exc

    async def _refresh(self, *, needed: bool) -> None:
        """Fetch the keys again, though not sooner than the pause allows; one at a time."""
        async with self._fetching:
            if time.monotonic() - self._tried < _PAUSE:
                if needed and not self._keys:
                    raise _away()
                return
            self._tried = time.monotonic()
            try:
                self._keys = await asyncio.to_thread(self._discover)
            except (OSError, ValueError, HTTPException, msgspec.MsgspecError, KeyError, TypeError) as exc:
                if needed:
                    raise _away() from exc
                return
            self._fetched = time.monotonic()

    def _discover(self) -> dict[str, Any]:
        document = fetch(f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")
        if document["issuer"] != self._issuer:
            raise ValueError("the provider calls itself by another name")
        found = cast("list[Any]", fetch(str(document["jwks_uri"]))["keys"])
        keys: dict[str, Any] = {}
        for raw in found[:100]:
            if isinstance(raw, dict):
                key = cast("dict[str, Any]", raw)
                if key.get("use", "sig") == "sig" and key.get("kty") in ("RSA", "EC", "OKP"):
                    keys[str(key.get("kid") or "")] = key
        return keys


def _fits(key: dict[str, Any], algorithm: str) -> bool:
    return key.get("kty") == _FAMILIES[algorithm[:2]] and key.get("alg", algorithm) == algorithm


def _away() -> Fault:
    return Fault(
        503,
        "issuer_unavailable",
        "the provider whose tokens are accepted here does not answer.",
        headers=((b"retry-after", b"15"),),
    )
