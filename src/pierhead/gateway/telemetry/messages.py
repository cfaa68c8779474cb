"""What the gateway tells the process beside it: length-prefixed MessagePack frames over a socket pair."""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from pierhead.config import GatewaySettings
from pierhead.gateway.outcome import Outcome

FRAME_MAX = 64 << 20
_LENGTH = struct.Struct("<I")


class Setup(msgspec.Struct, frozen=True, tag="setup", kw_only=True):
    """The first frame. ``endpoint`` is where traces and metrics go, ``records`` the recordings' folder ("": none)."""

    settings: GatewaySettings
    version: str
    endpoint: str = ""
    records: str = ""


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """A request and its answer as the client saw them: the body, and the answer with its head and framing.

    Each is cut at ``record_max_bytes``; the sizes are those before. ``replay_of`` is the id of the request that this
    one repeats ("": it is nobody's replay).
    """

    outcome: Outcome
    request: bytes
    request_size: int
    answer: bytes
    answer_size: int
    replay_of: str = ""


class Batch(msgspec.Struct, frozen=True, tag="batch", kw_only=True):
    """What happened in one turn of the loop. ``local`` are access log lines of answers that no model gave."""

    outcomes: list[Outcome] = []
    local: list[dict[str, Any]] = []
    exchanges: list[Exchange] = []


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Setup | Batch).decode


def frame(message: Setup | Batch) -> bytes:
    """One message as it travels."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Takes bytes as they come and gives whole messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Setup | Batch]:
        """The messages that are whole now; ValueError for what is none."""
        self._data += data
        found: list[Setup | Batch] = []
        at = 0
        while len(self._data) - at >= 4:
            (length,) = _LENGTH.unpack_from(self._data, at)
            if length > FRAME_MAX:
                raise ValueError("a frame is too long")
            if len(self._data) - at - 4 < length:
                break
            found.append(_decode(bytes(self._data[at + 4 : at + 4 + length])))
            at += 4 + length
        del self._data[:at]
        return found
