"""What became of a request, as one record, of which access log, journal, metrics and traces are made."""

from __future__ import annotations

import msgspec

from pierhead.gateway.usage import NOTHING, Usage


class Outcome(msgspec.Struct, kw_only=True, array_like=True):
    """One request for a model. Times in seconds: ``time`` is Unix time of its end, ``ttft`` 0 where nothing streamed.

    ``asked`` is the model's name as the client spelt it, ``model`` the name of what answered, to which the configured
    ``route`` led ("" without one); ``fallback`` is the same name where the first destination failed. ``status`` 499:
    the client left. ``code`` names the error, ``finish`` why the answer ended (as the engine says), ``revision`` is
    the beginning of the digest of the model that answered ("" for a provider's). ``retries`` counts further attempts,
    ``n`` the answers asked for. ``hit``: the answer came out of the cache. ``trace`` is the W3C traceparent that the
    client sent, ``span`` the id (hex) under which the engine saw the request.
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
    code: str = ""
    finish: str = ""
    fallback: str = ""
    revision: str = ""
    retries: int = 0
    n: int = 1
    hit: bool = False
    cost: int = 0  # in millionths of a US dollar, where a price is known
    trace: str = ""
    span: str = ""
    route: str = ""
