"""Which requests are recorded, and a client's connection that keeps a copy of what is sent to it; cleans nothing."""

from __future__ import annotations

import asyncio
import random
import re
from typing import TYPE_CHECKING, Any

from pierhead.config import GatewaySettings
from pierhead.gateway.outcome import Outcome
from pierhead.gateway.telemetry.messages import Exchange

if TYPE_CHECKING:
    from collections.abc import Callable

    from pierhead.gateway.admission import Admitted
    from pierhead.gateway.client import Client

_REPLAY = b"\r\nx-pierhead-replay: "
_ID = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")


class Tee:
    """Stands for a connection while one request is answered; ``settled`` is told what became of it."""

    def __init__(self, client: Client, request: Admitted, body: list[bytes], recorder: Recorder) -> None:
        self._client = client
        self._dialect = request.dialect
        self._recorder = recorder
        self._body = body
        self._replay_of = replay_of(request.forward)
        self._answer: list[bytes] = []
        self._kept = 0
        self._sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    @property
    def extra(self) -> bytes:
        """Header lines of this answer, which are the connection's."""
        return self._client.extra

    @extra.setter
    def extra(self, lines: bytes) -> None:
        self._client.extra = lines

    def write(self, data: bytes) -> None:
        """Send and keep."""
        self._keep(data)
        self._client.write(data)

    def send_fault(self, fault: Any, request_id: bytes) -> None:
        """An error envelope: only its body is kept; the head says nothing more."""
        body = fault.body(self._dialect, request_id)
        self._keep(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n" % fault.status)
        self._keep(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        self._client.send_fault(fault, request_id)

    def _keep(self, data: bytes) -> None:
        self._sent += len(data)
        room = self._recorder.most - self._kept
        if room > 0:
            self._answer.append(data[:room])
            self._kept += min(len(data), room)

    def settled(self, outcome: Outcome) -> None:
        """What is still to be sent of the answer is sent in this turn of the loop."""
        asyncio.get_running_loop().call_soon(self._finish, outcome)

    def _finish(self, outcome: Outcome) -> None:
        if self._recorder.errors_only and outcome.ok and outcome.status < 400:
            return
        self._recorder.put(
            Exchange(
                outcome=outcome,
                request=first(self._body, self._recorder.most),
                request_size=sum(map(len, self._body)),
                answer=b"".join(self._answer),
                answer_size=self._sent,
                replay_of=self._replay_of,
            )
        )


def replay_of(head: bytes) -> str:
    """The id of the request that this one repeats, as `pier replay` says in a header; "" for all others."""
    if _REPLAY not in head:
        return ""
    said = head.partition(_REPLAY)[2].partition(b"\r\n")[0].decode("latin-1")
    return said if _ID.fullmatch(said) else ""


def first(pieces: list[bytes], most: int) -> bytes:
    """The first ``most`` bytes of what may be much."""
    taken: list[bytes] = []
    for piece in pieces:
        taken.append(piece[:most])
        most -= len(taken[-1])
        if most <= 0:
            break
    return b"".join(taken)


class Recorder:
    """Applies the settings."""

    def __init__(self, settings: GatewaySettings, put: Callable[[Exchange], None]) -> None:
        self.most = settings.record_max_bytes
        self.errors_only = settings.record == "errors"
        self.put = put
        self._share = settings.record_sample if settings.record == "sampled" else 1.0
        self._except = frozenset(settings.record_except)

    def client(self, client: Client, request: Admitted, body: list[bytes]) -> Client:
        """What a request's answer is written to: the connection, or what keeps a copy."""
        if request.operation is None or not request.reads_json or self._spared(request):
            return client
        if self._share < 1.0 and random.random() >= self._share:  # noqa: S311  # a share, no secret
            return client
        tee: Any = Tee(client, request, body, self)
        return tee

    def _spared(self, request: Admitted) -> bool:
        holder = request.holder
        return holder is not None and bool(self._except) and not self._except.isdisjoint((holder.id, holder.key.name))
