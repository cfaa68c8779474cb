"""What became of a request, as one record, of which access log, journal, metrics and traces are made."""

from __future__ import annotations

import msgspec

from pierhead.gateway.usage import NOTHING, Usage


class Outcome(msgspec.Struct, kw_only=True):
    """One request for a model. Times in seconds: ``time`` is Unix time of its end, ``ttft`` 0 where nothing streamed.

    ``asked`` is the model's name as the client spelt it, ``model`` the route's. ``status`` 499: the client left.
    """

    id: str
    time: float
    key: str
    operation: str
    dialect: str
    asked: str
    model: str
    replica: str
    status: int
    ok: bool
    stream: bool
    usage: Usage = NOTHING
    queued: float = 0.0
    ttft: float = 0.0
    seconds: float = 0.0
    sent: int = 0
    peer: str = ""
    method: str = ""
    path: str = ""
    cost: int = 0  # in millionths of a US dollar, where a price is known
