"""The Open Inference Protocol's questions about the server and its models, and the control of its models.

What an engine that speaks the protocol knows better is asked of it; the rest is answered from the table of routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import msgspec

from pierhead.gateway import peer
from pierhead.gateway.admission import Admitted
from pierhead.gateway.dialects import kserve_models
from pierhead.gateway.faults import Fault
from pierhead.gateway.fetch import fetch
from pierhead.gateway.operations import MEMBER
from pierhead.gateway.routes import Entry
from pierhead.gateway.upstream import Target

if TYPE_CHECKING:
    from pierhead.gateway.services import Services

JSON = b"application/json"
Response = tuple[int, bytes, bytes, tuple[tuple[bytes, bytes], ...]]
Ends = Callable[[], tuple[peer.Address, peer.Address]]
ASKED = ("ready", "config", "stats")
REPOSITORY = "triton-repository"
INDEX = "/v2/repository/index"
_CONTROL = "/v2/repository/models/"
_TIMEOUT = 10.0
_LOAD_TIMEOUT = 600.0


class Questions:
    """Answers one at a time: at once, or as a coroutine where somebody has to be asked."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def answer(self, request: Admitted, ends: Ends) -> Response | Coroutine[None, None, Response]:
        """The answer to an admitted request for a path below ``/v2``."""
        path = request.local
        if path == "/v2":
            return _json(kserve_models.server())
        if path == "/v2/health/live":
            return _json({"live": True})
        if path.startswith("/v2/repository/"):
            return self._guarded(self._control(request, ends))
        rest = path.removeprefix("/v2/models/")
        name, _, what = rest.rpartition("/")
        if what not in ASKED:
            name, what = rest, ""
        name, _, version = name.partition("/versions/")
        try:
            entry, member = self._entry(unquote(name), request)
        except Fault as fault:
            return fault.status, JSON, fault.body("kserve"), ()
        if what == "ready" and not member and not version:
            return _json({"name": entry.name, "ready": True})
        if not (self._native(entry) or "infer" in (entry.facts.get("capabilities") or ())):
            if what in ("", "ready"):
                return _json(kserve_models.metadata(entry.facts) if not what else {"name": entry.name, "ready": True})
            text = f"the engine of '{entry.name}' tells nothing of that kind."
            return 404, JSON, Fault(404, "not_offered", text).body("kserve"), ()
        inner = f"/versions/{quote(version, safe='')}" if version else ""
        return self._guarded(self._asked(entry, member, f"{inner}/{what}" if what else inner))

    async def _guarded(self, work: Coroutine[None, None, Response]) -> Response:
        try:
            return await work
        except Fault as fault:
            return fault.status, JSON, fault.body("kserve"), ()

    def _entry(self, name: str, request: Admitted) -> tuple[Entry, str]:
        """The route of this name and which of its engine's models is meant; Fault when there is none for the key."""
        route = self._services.routes.owner(name)
        entry = self._services.routes.find(route)
        if request.holder is not None:
            request.holder.require_model(entry.name, entry.aliases)
        return entry, name[len(route) :].removeprefix(MEMBER)

    def _native(self, entry: Entry, operation: str = "infer") -> Target | None:
        """A target that runs and speaks the protocol itself."""
        return next((t for t in entry.targets if t.outside is None and operation in t.serves), None)

    async def _asked(self, entry: Entry, member: str, path: str) -> Response:
        """What the engine says of its model, started if need be."""
        target = self._native(entry) or await self._services.ensure_ready(entry.name, "")
        inner = member or target.model or entry.name
        found = await self._fetch(target, f"/v2/models/{quote(inner, safe='')}{path}", "GET", _TIMEOUT)
        if not path and not member:
            found = _renamed(found, entry.name)
        return 200, JSON, found, ()

    async def _fetch(self, target: Target, path: str, method: str, timeout: float) -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n".encode()
        if method == "POST":
            head += b"content-type: application/json\r\n"
        return await fetch(target, head, b"{}" if method == "POST" else b"", timeout=timeout)

    # --- the repository -------------------------------------------------------------------------------------------

    async def _control(self, request: Admitted, ends: Ends) -> Response:
        """KServe's extension: what there is, load, unload. Of a body nothing counts: it could bring a program along."""
        if request.local == INDEX:
            return _json(await self._index(request))
        name, _, verb = request.local.removeprefix(_CONTROL).rpartition("/")
        entry, member = self._entry(unquote(name), request)
        if request.own:
            await asyncio.to_thread(peer.may_change, *ends())
        if member:
            target = self._native(entry, REPOSITORY) or await self._services.ensure_ready(entry.name, "")
            if REPOSITORY not in target.serves:
                raise Fault(404, "not_offered", f"the engine of '{entry.name}' has one model only.")
            path = f"/v2/repository/models/{quote(member, safe='')}/{verb}"
            await self._fetch(target, path, "POST", _LOAD_TIMEOUT)
        elif verb == "load":
            await self._services.ensure_ready(entry.name, "")
        else:
            self._services.keep_loaded(entry.name, 0)
        return 200, JSON, b"", ()

    async def _index(self, request: Admitted) -> list[dict[str, Any]]:
        """Every model that the key may use, and those that their engines have besides."""
        found: list[dict[str, Any]] = []
        for entry in self._services.routes.distinct():
            if request.holder is not None and not request.holder.sees(entry.name, entry.aliases):
                continue
            state: dict[str, Any] = {"state": "READY"} if entry.targets else {"state": "UNAVAILABLE", "reason": _IDLE}
            found.append({"name": entry.name, "version": "1", **state})
            target = self._native(entry, REPOSITORY)
            if target is not None:
                found += await self._members(entry, target)
        return found

    async def _members(self, entry: Entry, target: Target) -> list[dict[str, Any]]:
        """The engine's own index, in names that clients here can send."""
        said = await self._fetch(target, INDEX, "POST", _TIMEOUT)
        try:
            models = msgspec.json.decode(said, type=list[dict[str, Any]])
        except msgspec.DecodeError:
            return []
        return [{**m, "name": f"{entry.name}{MEMBER}{m.get('name', '')}"} for m in models[:_MOST]]


_IDLE = "it does not run; a request starts it"
_MOST = 1000  # models of one engine that are listed


def _json(value: Any) -> Response:
    return 200, JSON, msgspec.json.encode(value), ()


def _renamed(text: bytes, name: str) -> bytes:
    """A model's metadata under the name that clients know."""
    try:
        said: dict[str, Any] = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        return text
    return msgspec.json.encode({**said, "name": name})
