"""A request in its lane: its wait for a slot, what it is told meanwhile, its second try elsewhere; sends no request."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from pierhead.gateway.delivery import Delivery
from pierhead.gateway.dialects.base import SSE
from pierhead.gateway.lanes import Place, Ticket
from pierhead.gateway.prompt import job_of
from pierhead.gateway.translate import headers
from pierhead.gateway.usage import Usage

if TYPE_CHECKING:
    from pierhead.gateway.ask import Ask
    from pierhead.gateway.upstream import Target

_TRIES: Final = 2  # replicas beside the first that one request may be sent to
_ANSWER: Final = 256  # tokens that an answer without a limit is taken to have, for the fairness of queues
_ANSWER_MAX: Final = 4096
_RETRIED = (502, 503, 504)  # statuses by which an engine says that another one may do better


class Seated(Delivery):
    """Holds a slot of a replica, from when it may be sent until it is settled."""

    _seat: Target | None = None
    _sat = 0.0  # when it got its slot, if not at once
    _cost = 0
    _tries = 0
    _ticket: Ticket | None = None

    # --- to a slot ----------------------------------------------------------------------------------------------------

    def _place(self, ask: Ask) -> Target | None:
        """The target to send to at once; None when that takes a while."""
        entry, operation = self._entry, self._request.operation
        assert entry is not None
        assert operation is not None
        lane = entry.lane
        if not operation.generates:
            return lane.lend()
        self._seat = target = lane.claim()
        if target is not None:
            if target.slots and 2 * target.busy >= target.slots:  # else nobody will wait soon: nothing to measure
                self._cost = self._guess(ask)
            return target
        if lane.chooses and self._skeleton is None:
            self._ticket = ticket = self._new_ticket(ask)
            ticket.job = job_of(entry.name, self._body)
            self._seat = lane.take(ticket, ticket.since)
        return self._seat

    async def _find_place(self) -> Target:
        """The same, however long it takes: a slot is waited for, and a model started. Fault when there is none."""
        entry, ask, operation = self._entry, self._ask, self._request.operation
        assert entry is not None
        assert ask is not None
        assert operation is not None
        lane, services = entry.lane, self._services
        if not operation.generates:
            target = lane.lend() or await services.ensure_ready(entry.name, "")
            lane.adopt(target)
            return target
        ticket = self._ticket
        if ticket is None:
            ticket = self._ticket = self._new_ticket(ask)
        if ticket.job is None and lane.chooses:
            ticket.job = await asyncio.to_thread(job_of, entry.name, self._body)
        self._seat = target = await lane.seat(
            ticket, lambda: services.ensure_ready(entry.name, ""), lambda: services.progress(entry.name)
        )
        self._sat = time.monotonic()
        if ticket.place is not None:
            self.queued = self._sat - ticket.since
            self._extra += _lines(ticket.place) + b"x-pierhead-queue-wait-ms: %d\r\n" % (self.queued * 1000)
        return target

    def _new_ticket(self, ask: Ask) -> Ticket:
        request, settings = self._request, self._services.settings
        entry, holder = self._entry, request.holder
        assert entry is not None
        traffic = entry.lane.settings
        patience = min(request.timeout or settings.request_timeout, traffic.queue_timeout)
        who = f"key {holder.id}" if holder is not None else self._client.peer
        cost = self._cost = self._guess(ask)
        ticket = Ticket(who, cost, self.started + patience, holder.grants.priority if holder is not None else 0)
        if traffic.sticky:
            ticket.session = self._session(traffic.sticky, ask)
        streams = ask.stream or (request.operation is not None and request.operation.name == "generate-stream")
        if streams and not self._then and request.dialect != "ollama" and not request.http10 and traffic.notice > 0:
            ticket.notice, ticket.tell = traffic.notice, self._tell
        return ticket

    def _guess(self, ask: Ask) -> int:
        """Tokens that the request will probably take."""
        limit = ask.limit
        return self._size // 4 + (_ANSWER if limit is None or limit < 0 else min(limit, _ANSWER_MAX))

    def _session(self, sticky: str, ask: Ask) -> str:
        """What the request is recognised by; users of different keys are different users."""
        found = ask.user if sticky == "user" else headers(self._request.forward).get(sticky.lower())
        return f"{self._request.key_id}:{found}" if found else ""

    @property
    def _text(self) -> bytes:
        """The body, or the skeleton of a large one."""
        return self._skeleton if self._skeleton is not None else self._body[0] if self._body else b""

    @property
    def _size(self) -> int:
        return len(self._body[0]) if len(self._body) == 1 else sum(map(len, self._body))

    def _tell(self, place: Place) -> None:
        """Tell the client of a stream how it stands, by a comment, which readers of events skip."""
        if not self.early:
            self.early = self._chunked = True
            self.status = 200
            self._client.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncache-control: no-cache\r\n%b"
                b"transfer-encoding: chunked\r\nx-request-id: %b\r\n%b\r\n"
                % (SSE, self._extra + _lines(place), self.id, self._client.connection_line())
            )
        if not self._client.writing_paused:
            expected = "" if place.expected is None else f" expected={place.expected:.1f}s"
            note = f" {place.note}" if place.note else ""
            text = f": queued position={place.position}{expected}{note}".replace("\r", " ").replace("\n", " ")
            line = text.encode("utf-8", "replace") + b"\n\n"
            self._client.write(b"%x\r\n%b\r\n" % (len(line), line))

    # --- from one to another ------------------------------------------------------------------------------------------

    def _claim(self, target: Target | None) -> None:
        """Count this request on ``target`` and on no other."""
        if self._target is not None:
            self._target.open -= 1
            self._target.changed = True
        self._target = target
        if target is not None:
            target.open += 1
            target.changed = True

    def _move(self, target: Target) -> None:
        """The slot's replica is gone, and another has taken its place."""
        entry, seat = self._entry, self._seat
        assert entry is not None
        entry.lane.adopt(target)
        if seat is not None and seat is not target:
            self._vacate()
            target.busy += 1
            self._seat = target
        self._claim(target)

    def _elsewhere(self, status: int = 502) -> bool:
        if status in _RETRIED and self._switch():
            self._again()
            return True
        return False

    def _switch(self) -> bool:
        """Take another replica, when there is one and nothing of an answer has been sent."""
        entry, seat, ticket = self._entry, self._seat, self._ticket
        if entry is None or seat is None or not self._body or self._tries >= _TRIES or not entry.lane.chooses:
            return False
        if ticket is None:
            assert self._ask is not None
            ticket = self._ticket = self._new_ticket(self._ask)
        ticket.tried.add(seat.replica)
        if not entry.lane.other(ticket):
            return False
        entry.lane.ended(seat, False)
        self._vacate()
        self._seat = other = entry.lane.retake(ticket)
        self._claim(other)
        self._tries += 1
        self._outgoing = self._answer = self._collected = None
        self._retried = self._faulty = False
        if self._stats is not None:
            self._stats.retries += 1
        return True

    # --- its end ------------------------------------------------------------------------------------------------------

    def _begun(self) -> None:
        """The first event of the answer is here."""
        if self._ticket is not None and self._ticket.job is not None and self._entry is not None:
            self._entry.lane.first_token(self._ticket.job)

    def _release(self, target: Target, ok: bool, usage: Usage) -> None:
        super()._release(target, ok, usage)
        entry = self._entry
        if entry is None:
            return
        if not ok or not target.health.spotless:
            entry.lane.ended(target, ok or (False if self._faulty else None))
        if self._seat is None:
            return
        lane = entry.lane  # no other lane may wait for this slot, as after its endpoint went to a route of another name
        if self._cost or self._ticket is not None or lane.waiting or len(target.lanes) > 1 or lane not in target.lanes:
            self._vacate()
        else:
            self._seat = None
            target.busy -= 1

    def _vacate(self) -> None:
        """Give the slot back."""
        seat, self._seat = self._seat, None
        entry, ticket = self._entry, self._ticket
        assert seat is not None
        assert entry is not None
        since = self._sat or self.started
        job = ticket.job if ticket is not None else None
        entry.lane.leave(seat, job, time.monotonic() - since if self._cost else 0.0, self._cost)


def _lines(place: Place) -> bytes:
    """What a client is told on arrival, as headers."""
    line = b"x-pierhead-queue-position: %d\r\n" % place.position
    if place.expected is not None:
        line += b"x-pierhead-queue-expected-ms: %d\r\n" % (place.expected * 1000)
    return line
