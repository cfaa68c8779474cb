"""Who may ask: API keys checked against the snapshot's hashes; keeps no key."""

from __future__ import annotations

import hashlib
import hmac
import time

from pierhead.gateway.budgets import Budgets
from pierhead.gateway.faults import Fault
from pierhead.gateway.holder import Holder
from pierhead.gateway.link import Key
from pierhead.gateway.wire import Head

_HINT = "Send 'Authorization: Bearer KEY'; make a key with: pier key create NAME"
_CHALLENGE = ((b"www-authenticate", b'Bearer realm="pierhead"'),)
_LONGEST = 512


class Keys:
    """The accepted keys; ``pepper`` and the MACs are hex. Holders of ``before`` live on, so that counters do."""

    def __init__(
        self,
        keys: tuple[Key, ...] = (),
        pepper: str = "",
        before: Keys | None = None,
        room: Budgets | None = None,
    ) -> None:
        self._pepper = bytes.fromhex(pepper)
        self._holders: dict[str, Holder] = {}
        self._macs: dict[bytes, tuple[bytes, Holder, float]] = {}  # the last: until when (Unix time, 0: for ever)
        old = before._holders if before is not None else {}
        for key in keys:
            holder = old.get(key.id)
            if holder is None:
                holder = Holder(key, room)
            else:
                holder.update(key)
            self._holders[key.id] = holder
            self._accept(key.mac, holder, key.grants.expires)
            if key.old_mac:
                self._accept(key.old_mac, holder, min(key.old_until, key.grants.expires or key.old_until))
        self._next = self._soonest()

    def _accept(self, mac: str, holder: Holder, until: float) -> None:
        raw = bytes.fromhex(mac)
        self._macs[raw] = raw, holder, until

    def __bool__(self) -> bool:
        return bool(self._macs)

    def holders(self) -> tuple[Holder, ...]:
        """Everyone who has a key."""
        return tuple(self._holders.values())

    def check(self, head: Head) -> Holder:
        """Whose key a request came with: a bearer token or, as with Anthropic's clients, x-api-key; else Fault 401."""
        key = given(head)
        if key is None:
            raise Fault(401, "missing_api_key", "an API key is needed here.", hint=_HINT, headers=_CHALLENGE)
        return self.find(key)

    def find(self, key: bytes) -> Holder:
        """Whose key this is; Fault 401."""
        if key and len(key) <= _LONGEST:
            mac = hmac.digest(self._pepper, key, hashlib.sha256)
            # A lookup by MAC leaks nothing: without the pepper no client can choose what it compares.
            found = self._macs.get(mac)
            if found is not None and hmac.compare_digest(mac, found[0]):
                if found[2] and found[2] <= time.time():
                    raise Fault(401, "expired_api_key", "the API key has expired.", hint=_HINT, headers=_CHALLENGE)
                return found[1]
        raise Fault(401, "invalid_api_key", "the API key is not known here.", hint=_HINT, headers=_CHALLENGE)

    def lapsed(self, now: float) -> bool:
        """Whether a key has expired since the last call: what was decided about it before holds no more."""
        if not self._next or now < self._next:
            return False
        self._next = self._soonest(now)
        return True

    def _soonest(self, after: float = 0.0) -> float:
        return min((until for _, _, until in self._macs.values() if until > after), default=0.0)


def given(head: Head) -> bytes | None:
    """The secret that a request came with; b"" where it is of another scheme, None without one."""
    authorization = head.get(b"authorization")
    if authorization:
        scheme, _, key = authorization.partition(b" ")
        return key.strip() if scheme.lower() == b"bearer" else b""
    return head.get(b"x-api-key") or None
