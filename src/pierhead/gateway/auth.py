"""Who may ask: API keys checked against the snapshot's hashes; keeps no key."""

from __future__ import annotations

import hashlib
import hmac

from pierhead.gateway.faults import Fault
from pierhead.gateway.link import Key

_HINT = "Send 'Authorization: Bearer KEY'; make a key with: pier key create NAME"


class Keys:
    """The accepted keys; ``pepper`` and the MACs are hex."""

    def __init__(self, keys: tuple[Key, ...] = (), pepper: str = "") -> None:
        self._pepper = bytes.fromhex(pepper)
        macs = [(bytes.fromhex(key.mac), key.id) for key in keys]
        self._keys = {mac: (mac, name) for mac, name in macs}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def check(self, authorization: bytes | None) -> str:
        """The id of the key in an Authorization header; Fault 401 otherwise."""
        if not authorization:
            raise Fault(401, "missing_api_key", "an API key is needed here.", hint=_HINT, headers=_CHALLENGE)
        scheme, _, key = authorization.partition(b" ")
        key = key.strip()
        if scheme.lower() == b"bearer" and key and len(key) <= 512:
            mac = hmac.digest(self._pepper, key, hashlib.sha256)
            # A lookup by MAC leaks nothing: without the pepper no client can choose what it compares.
            found = self._keys.get(mac)
            if found is not None and hmac.compare_digest(mac, found[0]):
                return found[1]
        raise Fault(401, "invalid_api_key", "the API key is not known here.", hint=_HINT, headers=_CHALLENGE)


_CHALLENGE = ((b"www-authenticate", b'Bearer realm="pierhead"'),)
