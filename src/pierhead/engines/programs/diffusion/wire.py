"""How the server and the process that paints talk over pipes: a JSON head, then bytes as many as the head says."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any, BinaryIO

_LENGTH = struct.Struct("<I")
MAX_HEAD = 1 << 20


def packed(head: dict[str, Any], *blobs: bytes) -> bytes:
    """One message."""
    text = json.dumps({**head, "blobs": [len(blob) for blob in blobs]}).encode()
    return b"".join((_LENGTH.pack(len(text)), text, *blobs))


def read(stream: BinaryIO) -> tuple[dict[str, Any], list[bytes]]:
    """The next message; EOFError when the other side is gone."""
    head: dict[str, Any] = json.loads(_exactly(stream, _LENGTH.unpack(_exactly(stream, _LENGTH.size))[0]))
    return head, [_exactly(stream, size) for size in head["blobs"]]


async def receive(stream: asyncio.StreamReader) -> tuple[dict[str, Any], list[bytes]]:
    """The same for the server; asyncio.IncompleteReadError when the other side is gone."""
    (length,) = _LENGTH.unpack(await stream.readexactly(_LENGTH.size))
    head: dict[str, Any] = json.loads(await stream.readexactly(min(length, MAX_HEAD)))
    return head, [await stream.readexactly(size) for size in head["blobs"]]


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
