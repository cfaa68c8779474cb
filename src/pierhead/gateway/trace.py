"""W3C trace context: reads what clients send and makes what engines get; exports nothing."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")


class Context(NamedTuple):
    """``remote``: a client's span is the parent."""

    trace: str
    span: str
    sampled: bool
    remote: bool


def parse(header: str) -> Context | None:
    """A ``traceparent``; None for what is none. One whose span is all zeros was begun by us."""
    found = _FORM.match(header)
    if found is None:
        return None
    version, trace, span, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest) or trace == "0" * 32:
        return None
    return Context(trace, span, bool(int(flags, 16) & 1), span != "0" * 16)


class Tracer:
    """Continues traces of clients, and begins a ``share`` of those that none of them began."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._random = random.SystemRandom()
        self._bits = random.Random(self._random.getrandbits(128)).getrandbits  # noqa: S311  # ids need no secrecy

    def begin(self, header: str) -> tuple[str, str]:
        """(the trace's context, the id of our span) of one request."""
        if parse(header) is None or header[36:52] == "0" * 16:
            trace = self._bits(128) or 1
            sampled = self._share >= 1.0 or self._bits(53) < self._share * (1 << 53)
            header = f"00-{trace:032x}-{0:016x}-{int(sampled):02x}"
        return header, f"{self._bits(64) or 1:016x}"


def onward(header: str, span: str) -> bytes:
    """The header for the engine, whose parent is our span."""
    return b"traceparent: 00-%b-%b-%b\r\n" % (header[3:35].encode(), span.encode(), header[53:55].encode())
