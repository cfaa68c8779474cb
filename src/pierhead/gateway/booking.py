"""What is booked when a request has ended: metrics, the key's hold, the replica, the outcome; sends nothing."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

from pierhead.gateway.outcome import Outcome
from pierhead.gateway.trace import onward
from pierhead.gateway.usage import NOTHING, Usage, finish, plus

if TYPE_CHECKING:
    from pierhead.gateway.admission import Admitted
    from pierhead.gateway.ask import Ask
    from pierhead.gateway.client import Client
    from pierhead.gateway.holder import Hold
    from pierhead.gateway.metrics import ModelStats
    from pierhead.gateway.outgoing import Outgoing
    from pierhead.gateway.plans import Live
    from pierhead.gateway.routes import Entry
    from pierhead.gateway.services import Services
    from pierhead.gateway.stream import Stream
    from pierhead.gateway.upstream import Target


class Booked:
    """A request that is counted at its end, once. Defaults live on the class: the usual way sets few of them."""

    status = 0
    sent = 0
    code = ""  # of the error that the client was told
    queued = 0.0  # seconds that it waited for a slot
    trace = ""
    span = ""
    hit = False  # the answer came out of the response cache
    usage = NOTHING
    _tail = b""  # the end of a whole answer
    _ask: Ask | None = None
    _entry: Entry | None = None
    _hold: Hold | None = None
    _stats: ModelStats | None = None
    _target: Target | None = None
    _stream: Stream | None = None
    _outgoing: Outgoing | None = None  # what the engine gets; None until that is made for the target
    _asked = False  # whether an engine has begun to work for it
    _calls: list[Usage] | None = None  # what engines worked for it before that
    _plan: Live | None = None  # of a configured route
    _attempts = 1
    _retried = False
    _booked = False

    def __init__(
        self, services: Services, client: Client, request: Admitted, body: list[bytes], request_id: bytes
    ) -> None:
        self._services = services
        self._client = self._asker = client
        self._request = request
        self._body: list[bytes] = body
        self.id = request_id
        self.started = time.monotonic()
        services.metrics.relays += 1

    @property
    def client(self) -> Client:
        """Where the answer is written to in the end."""
        return self._asker

    def _settle(self, ok: bool) -> None:
        """Book what became of the request, once, before the client sees the end of it."""
        if self._booked:
            return
        self._booked = True
        self._services.metrics.relays -= 1
        if self._plan is not None:
            self._counted(ok)
        self._body = []
        told = self.usage.known
        made, self._outgoing = self._outgoing, None
        if made is not None and made.spent.known:
            self.usage = plus(self.usage, made.spent)
        due, worked = self._due(told)
        stats, target, usage = self._stats, self._target, self.usage
        now = time.monotonic()
        if stats is not None:
            stats.prompt_tokens += usage.prompt
            stats.completion_tokens += usage.completion
            if ok or self.status >= 400:
                stats.finished(self.status, now - self.started)
            else:
                stats.aborted += 1
        if self._hold is not None:
            self._hold.settle(due, worked)
            self._hold = None
            self._services.metrics.holds -= 1
        if target is not None:
            self._release(target, ok, usage)
        self._services.settled(self._outcome(ok, now) if self._entry is not None else None, self)

    def _due(self, told: bool) -> tuple[Usage, bool]:
        """What the key pays for (unknown: the most), and whether engines worked at all; ``told``: the last one said."""
        if self._asked and (self.status < 400 or self.status in (499, 504)):
            return self.usage if told else NOTHING, True
        calls = self._calls
        if not calls:
            return NOTHING, False
        if not all(call.known for call in calls):
            return NOTHING, True
        due = functools.reduce(plus, calls)
        if not self.usage.known:
            self.usage = due
        return due, True

    def _counted(self, ok: bool) -> None:
        """A request for a configured route has ended."""

    def _release(self, target: Target, ok: bool, usage: Usage) -> None:
        target.prompt_tokens += usage.prompt
        target.completion_tokens += usage.completion
        target.open -= 1
        target.changed = True
        target.last_used = time.time()
        if ok:
            target.finished += 1
        else:
            target.failed += 1
        if not target.open:
            self._services.replica_idle()

    def _traced(self) -> bytes:
        """The header by which the engine's work is part of the client's trace; b"" without tracing."""
        tracer = self._services.tracer
        if tracer is None or self._request.control:
            return b""
        if not self.span:
            self.trace, self.span = tracer.begin(self._request.traceparent)
        return onward(self.trace, self.span)

    def facts(self) -> dict[str, Any]:
        """The access log's line for a request of the control API, or one that no route was found for."""
        request = self._request
        return {
            "time": round(time.time(), 3),
            "id": self.id.decode("latin-1"),
            "peer": self._client.peer,
            "method": request.method,
            "path": request.path,
            "status": self.status,
            "key": request.key_id,
            "bytes": self.sent,
            "seconds": round(time.monotonic() - self.started, 6),
        } | ({"code": self.code} if self.code else {})

    def _outcome(self, ok: bool, now: float) -> Outcome:
        request, ask, entry, stream, target = self._request, self._ask, self._entry, self._stream, self._target
        assert request.operation is not None
        assert ask is not None
        assert entry is not None
        outcome = Outcome(
            id=self.id.decode("latin-1"),
            time=time.time(),
            key=request.key_id,
            operation=request.operation.name,
            dialect=request.dialect,
            asked=ask.model or "",
            model=entry.name,
            replica=target.replica if target is not None else "",
            revision=target.revision if target is not None else "",
            status=self.status,
            ok=ok,
            stream=stream is not None,
            usage=self.usage,
            seconds=now - self.started,
            sent=self.sent,
        )
        if self._asked or self._calls:
            outcome.cost = self._services.room.cost(entry, self.usage)
        if stream is not None and stream.first:
            outcome.ttft = stream.first - self.started
        if self.status != 200 or self._plan is not None or self.queued or self.hit or self.code:
            self._unusual(outcome, entry)
        if self._services.observer is not None:
            self._more(outcome, ask)
        return outcome

    def _unusual(self, outcome: Outcome, entry: Entry) -> None:
        """What most requests have nothing to say of."""
        outcome.queued = self.queued
        outcome.route = self._plan.name if self._plan is not None else ""
        outcome.fallback = entry.name if self._attempts > 1 else ""
        outcome.retries = self._attempts - 1
        outcome.code = self.code
        outcome.hit = self.hit

    def _more(self, outcome: Outcome, ask: Ask) -> None:
        """What only logs, traces and recordings want."""
        request = self._request
        outcome.peer, outcome.method, outcome.path = self._client.peer, request.method, request.path
        self._traced()
        outcome.trace, outcome.span = self.trace, self.span
        outcome.finish = finish(self._stream.tail if self._stream is not None else self._tail)
        outcome.n = ask.n or 1
