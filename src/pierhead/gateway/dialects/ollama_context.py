"""The ``context`` of Ollama's ``/api/generate``: a conversation as numbers that only we read; pure.

Clients hand it back unread. It holds the messages themselves, not tokens, so that the next request is formatted by the
model's own chat template as a whole, on whatever engine. Images are not kept in it, as Ollama does not keep them.
"""

from __future__ import annotations

import zlib

import msgspec

from pierhead.gateway.faults import bad_request

_MARK = 0x50494552  # larger than any token's number
_MOST = 8 << 20  # bytes of messages


class Said(msgspec.Struct, array_like=True):
    """One message."""

    role: str
    content: str


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[Said]).decode


def packed(messages: list[Said]) -> list[int]:
    """The numbers, three bytes in each, the first two of them a mark and the length."""
    data = zlib.compress(_encode(messages), 1)
    padded = data + bytes(-len(data) % 3)
    words = [int.from_bytes(padded[at : at + 3], "big") for at in range(0, len(padded), 3)]
    return [_MARK, len(data), *words]


def unpacked(numbers: list[int]) -> list[Said]:
    """The messages; Fault 400 for numbers that are not ours."""
    try:
        mark, length, *words = numbers
        if mark != _MARK or not 0 <= length <= 3 * len(words):
            raise ValueError
        data = b"".join(word.to_bytes(3, "big") for word in words)[:length]
        text = zlib.decompressobj().decompress(data, _MOST)
        found = _decode(text)
        if any(said.role not in ("system", "user", "assistant") for said in found):
            raise ValueError
    except (ValueError, OverflowError, zlib.error, msgspec.MsgspecError, RecursionError) as exc:
        raise bad_request(
            "this context was not made here: send the numbers of an earlier answer of this server unchanged, or use "
            "/api/chat.",
            param="context",
        ) from exc
    return found
