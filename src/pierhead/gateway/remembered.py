"""A relay for keys that use the response cache: answers from it, or records an engine's answer; others have none."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from pierhead.gateway import translate
from pierhead.gateway.ask import read_ask
from pierhead.gateway.cache import Kept, name
from pierhead.gateway.faults import Fault
from pierhead.gateway.holder import Hold
from pierhead.gateway.plan import bound_of
from pierhead.gateway.relay import Relay
from pierhead.gateway.skeleton import INLINE
from pierhead.gateway.usage import Usage

if TYPE_CHECKING:
    from pierhead.gateway.client import Client


class Recorder:
    """Stands before a client's connection and keeps a copy of what is written, up to ``most`` bytes."""

    def __init__(self, client: Client, most: int, done: Callable[[bytes], None]) -> None:
        self._client = client
        self._left = most
        self._pieces: list[bytes] = []
        self._done = done

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._client, attribute)

    @property
    def extra(self) -> bytes:
        """See the connection."""
        return self._client.extra

    @extra.setter
    def extra(self, value: bytes) -> None:
        self._client.extra = value

    def write(self, data: bytes) -> None:
        """Send bytes, and remember them."""
        self._left -= len(data)
        if self._left >= 0:
            self._pieces.append(data)
        else:
            self._pieces.clear()
        self._client.write(data)

    def relay_done(self) -> None:
        """The answer is complete."""
        if self._left >= 0:
            self._done(b"".join(self._pieces))
        self._client.relay_done()


class Remembered(Relay):
    """Tells the client by ``x-pierhead-cache`` whether it was a hit or a miss."""

    _name: bytes | None = None
    _whole_answer = False
    _clamp = 0  # the tokens that limits of the key leave an answer, where the client did not ask for fewer

    def start(self, skeleton: bytes | None = None) -> None:
        """Begin with the cache."""
        try:
            if skeleton is None and self._body and len(self._body[0]) <= INLINE and self._replayed(self._body[0]):
                return
        except Fault as fault:
            self._fail(fault)
            return
        super().start(skeleton)

    def _replayed(self, body: bytes) -> bool:
        """Whether the answer came from the cache."""
        request, services = self._request, self._services
        holder, operation = request.holder, request.operation
        if holder is None or operation is None or not request.reads_json:
            return False
        given = translate.headers(request.forward)
        control, wish = given.get("cache-control", "").lower(), given.get("x-pierhead-cache", "").lower()
        if "no-store" in control or wish == "off":
            return False
        ask = read_ask(body)
        entry = services.routes.find(ask.model or "")
        holder.allow(operation, entry.name, entry.aliases)
        if entry.plan is not None:  # which model answers is decided anew each time
            return False
        who = "" if services.settings.cache_shared else holder.id
        self._name = name(who, operation.name, entry, body, wish == "on")
        if self._name is None:
            return False
        kept = services.cache.get(self._name, time.monotonic()) if "no-cache" not in control else None
        if kept is None:
            self._client = cast("Client", Recorder(self._client, services.cache.most, self._record))
            return False
        self._ask, self._entry = ask, entry
        self._stats = services.metrics.model(entry.name)
        self._granted(hold := holder.begin_free(operation))
        self._client.extra = hold.headers + b"x-pierhead-cache: hit\r\n"
        self.status = 200
        self.hit = True
        self.usage = Usage(kept.usage.prompt, kept.usage.completion, kept.usage.prompt, kept.usage.known)
        self._whole(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n" % kept.kind, kept.body)
        return True

    def _granted(self, hold: Hold) -> None:
        super()._granted(hold)
        bound = bound_of(self._ask) if self._ask is not None else None
        self._clamp = hold.cap if bound is None or bound > hold.cap else 0
        if self._name is not None:
            self._client.extra += b"x-pierhead-cache: miss\r\n"

    def _settle(self, ok: bool) -> None:
        super()._settle(ok)
        usage, clamp = self.usage, self._clamp
        cut = clamp and (not usage.known or usage.completion >= clamp)  # by what was left of a budget, not as asked
        self._whole_answer = ok and self.status == 200 and not cut

    def _record(self, raw: bytes) -> None:
        """Keep an answer that came whole from an engine, and came well."""
        head, _, body = raw.partition(b"\r\n\r\n")
        parts = (line.partition(b": ") for line in head.lower().split(b"\r\n")[1:])
        lines = {header: value for header, _, value in parts}
        kind = lines.get(b"content-type", b"")
        if not self._whole_answer or not head.startswith(b"HTTP/1.1 200") or self._name is None or not kind:
            return
        if b"content-encoding" in lines:
            return
        if lines.get(b"transfer-encoding") == b"chunked":
            body = _unchunked(body)
        if body.startswith(b":"):  # begins with a word about the queue, which is of another time
            return
        cache = self._services.cache
        cache.put(self._name, Kept(kind, body, self.usage, time.monotonic() + cache.ttl))


def _unchunked(body: bytes) -> bytes:
    """The inside of chunks that the gateway made itself."""
    pieces: list[bytes] = []
    at = 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        if not size:
            return b"".join(pieces)
        pieces.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
