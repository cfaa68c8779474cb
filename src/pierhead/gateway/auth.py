"""Who may ask: API keys checked against the snapshot's hashes; keeps no key."""

from __future__ import annotations

import hashlib
import hmac

from pierhead.gateway.faults import Fault
from pierhead.gateway.holder import Holder
from pierhead.gateway.link import Key
from pierhead.gateway.wire import Head

_HINT = "Send 'Authorization: Bearer KEY'; make a key with: pier key create NAME"


class Keys:
    """The accepted keys; ``pepper`` and the MACs are hex."""

    def __init__(self, keys: tuple[Key, ...] = (), pepper: str = "") -> None:
        self._pepper = bytes.fromhex(pepper)
        self._keys = {(mac := bytes.fromhex(key.mac)): (mac, Holder(key)) for key in keys}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def check(self, head: Head) -> Holder:
        """Whose key a request came with: a bearer token or, as with Anthropic's clients, x-api-key; else Fault 401."""
        authorization = head.get(b"authorization")
        if authorization:
            scheme, _, key = authorization.partition(b" ")
            key = key.strip() if scheme.lower() == b"bearer" else b""
        else:
            key = head.get(b"x-api-key") or b""
            if not key:
                raise Fault(401, "missing_api_key", "an API key is needed here.", hint=_HINT, headers=_CHALLENGE)
        if key and len(key) <= 512:
            mac = hmac.digest(self._pepper, key, hashlib.sha256)
            # A lookup by MAC leaks nothing: without the pepper no client can choose what it compares.
            found = self._keys.get(mac)
            if found is not None and hmac.compare_digest(mac, found[0]):
                return found[1]
        raise Fault(401, "invalid_api_key", "the API key is not known here.", hint=_HINT, headers=_CHALLENGE)


_CHALLENGE = ((b"www-authenticate", b'Bearer realm="pierhead"'),)
