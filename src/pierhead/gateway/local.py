"""The answers that the gateway gives by itself: health, models, metrics, preflight; relays nothing."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec

from pierhead.gateway import plans
from pierhead.gateway.admission import Admitted
from pierhead.gateway.described import ENDING, described
from pierhead.gateway.dialects import anthropic_models
from pierhead.gateway.faults import Fault
from pierhead.gateway.kserve_local import Ends, Questions
from pierhead.gateway.lane_metrics import lane_metrics
from pierhead.gateway.routes import Entry
from pierhead.gateway.scrape import scrape
from pierhead.gateway.services import Services
from pierhead.gateway.stored import Stored
from pierhead.gateway.vitals import vitals

if TYPE_CHECKING:
    from pierhead.gateway.answering import Answering

JSON = b"application/json"
Response = tuple[int, bytes, bytes, tuple[tuple[bytes, bytes], ...]]
_PREFLIGHT = (
    (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
    (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
    (b"access-control-max-age", b"600"),
)


_FIXED: dict[str, Response] = {
    "preflight": (204, JSON, b"", _PREFLIGHT),
    "health": (200, JSON, b'{"status":"ok"}', ()),
    # What Ollama's clients ask to see whether anybody is there.
    "root": (200, b"text/plain; charset=utf-8", b"Pierhead is running", ()),
}


@functools.cache
def _openapi() -> bytes:
    from pierhead.gateway.openapi import document  # made when it is first asked for

    return msgspec.json.encode(document())


class Locals:
    """Knows every local path; ``answer`` gives a response at once or a coroutine for one."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._stored = Stored(services.answers)
        self._questions = Questions(services)

    def answer(self, request: Admitted, body: list[bytes], ends: Ends) -> Response | Coroutine[None, None, Response]:
        """The response to an admitted request whose ``local`` is set; Fault as its result when there is none."""
        name = request.local
        if name in _FIXED:
            return _FIXED[name]
        if name == "ready":
            return self._ready()
        if name == "/metrics":
            return self._metrics()
        if name == "/openapi.json":
            return 200, JSON, _openapi(), ()
        if name.startswith(("/v1/responses/", "/v1/conversations")):
            return self._kept(request, b"".join(body))
        if request.dialect == "anthropic":
            return self._anthropic(request)
        if request.dialect == "kserve":
            return self._kserve(request, ends)
        if name in ("/v1/models", "/models"):
            return 200, JSON, self._listed(request, docker=name == "/models"), ()
        return self._model(name, request)

    def _ready(self) -> Response:
        if self._services.draining:
            return 503, JSON, b'{"status":"draining"}', ()
        if self._services.routes.version < 0:
            return 503, JSON, b'{"status":"waiting for the daemon"}', ()
        return 200, JSON, b'{"status":"ready"}', ()

    async def _kept(self, request: Admitted, body: bytes) -> Response:
        """What is stored of responses and conversations."""
        try:
            return 200, JSON, await self._stored.answer(request, body), ()
        except Fault as fault:
            return fault.status, JSON, fault.body(), ()

    def _seen(self, request: Admitted) -> list[Entry]:
        """The models that the key may use."""
        holder = request.holder
        return [
            entry
            for entry in self._services.routes.distinct()
            if holder is None or holder.sees(entry.name, entry.aliases)
        ]

    def _listed(self, request: Admitted, docker: bool = False) -> bytes:
        """The models, but only those that the key may use."""
        routes, holder = self._services.routes, request.holder
        if holder is None or not holder.grants.models:
            return routes.docker if docker else routes.models
        if docker:
            return b"[" + b",".join(e.docker for e in self._seen(request)) + b"]"
        return b'{"object":"list","data":[' + b",".join(e.card for e in self._seen(request)) + b"]}"

    def _entry(self, name: str, request: Admitted) -> Entry:
        """The model of this name; Fault when there is none, or none for the key."""
        entry = self._services.routes.find(unquote(name))
        if request.holder is not None:
            request.holder.require_model(entry.name, entry.aliases)
        return entry

    def _anthropic(self, request: Admitted) -> Response:
        """The models as Anthropic's clients expect them."""
        try:
            if request.local == "/v1/models":
                cards = [entry.facts for entry in self._seen(request)]
                return 200, JSON, anthropic_models.page(cards, request.query), ()
            entry = self._entry(request.local.removeprefix("/v1/models/"), request)
            return 200, JSON, anthropic_models.card(entry.facts), ()
        except Fault as fault:
            return fault.status_in("anthropic"), JSON, fault.body("anthropic", request.request_id), ()

    def _kserve(self, request: Admitted, ends: Ends) -> Response | Coroutine[None, None, Response]:
        """The Open Inference Protocol's questions; a model is ready when a request for it will be answered."""
        if request.local == "/v2/health/ready":
            status, kind, body, headers = self._ready()
            return status, kind, b'{"live":true,"ready":true}' if status == 200 else body, headers
        return self._questions.answer(request, ends)

    def _model(self, path: str, request: Admitted) -> Response | Coroutine[None, None, Response]:
        _, _, name = path.removeprefix("/v1").partition("/models/")
        if name.endswith(ENDING) and path.startswith("/v1/"):
            return self._document(name.removesuffix(ENDING), request)
        try:
            entry = self._entry(name, request)
        except Fault as fault:
            return fault.status, JSON, fault.body(), ()
        return 200, JSON, entry.card if path.startswith("/v1/") else entry.docker, ()

    async def _document(self, name: str, request: Admitted) -> Response:
        """The OpenAPI document of one model."""
        try:
            return 200, JSON, await described(self._services, self._entry(name, request)), ()
        except Fault as fault:
            return fault.status, JSON, fault.body(), ()

    async def _metrics(self) -> Response:
        routes = list(self._services.routes.targets())
        own = self._services.metrics.render((model, t.replica, t.open) for model, t in routes)
        held = vitals(self._services)
        own += lane_metrics(lane for (_, real), lane in self._services.routes.lanes.items() if real)
        own += plans.render(self._services.routes.plans())
        for family in self._services.metrics.families():
            own += family
            await asyncio.sleep(0)  # there may be many keys
        engines = await scrape([(model, t) for model, t in routes if t.outside is None])
        return 200, b"text/plain; version=0.0.4; charset=utf-8", (own + held + engines).encode(), ()


class LocalAnswer:
    """Delivers a local response; owns the task when it takes time."""

    __slots__ = ("_client", "_id", "_task", "started", "status")

    def __init__(self, client: Answering, request_id: bytes) -> None:
        self._client = client
        self._id = request_id
        self._task: asyncio.Task[None] | None = None
        self.started = time.monotonic()
        self.status = 0

    def start(self, response: Response | Coroutine[None, None, Response]) -> None:
        """Send it, now or when it is there."""
        if isinstance(response, tuple):
            self._send(response)
        else:
            self._task = asyncio.get_running_loop().create_task(self._wait(response))
            self._task.add_done_callback(self._waited)

    def _waited(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:  # a bug of ours: say so, leave nobody waiting
            asyncio.get_running_loop().call_exception_handler({"message": "a local answer broke", "task": task})
            self.expire(Fault(500, "internal", "the gateway failed on this request; this is a bug."))

    async def _wait(self, response: Coroutine[None, None, Response]) -> None:
        self._send(await response)

    def _send(self, response: Response) -> None:
        self.status, kind, body, headers = response
        self._client.send_local(self.status, kind, body, self._id, headers)
        self._client.relay_done()

    def cancel(self) -> None:
        """The client went away."""
        if self._task is not None:
            self._task.cancel()

    def expire(self, fault: Fault) -> None:
        """It took too long, or it broke."""
        self.cancel()
        if self.status:  # a bug after the answer began: nobody knows what the client has of it
            self._client.abort()
            return
        self.status = fault.status
        self._client.send_fault(fault, self._id)
        self._client.relay_done()

    def pause(self) -> None:
        """Nothing more comes than what was sent."""

    def resume(self) -> None:
        """See ``pause``."""

    def probe(self) -> None:
        """See ``pause``."""
