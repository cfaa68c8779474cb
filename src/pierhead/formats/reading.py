"""How headers are read: a reader asks for parts of files and is given them; who answers it never knows.

A reader is a generator that yields ``Ask`` and is sent bytes. The same reader works on a local file, on a blob and by
range requests.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple, NoReturn, TypeVar

from pierhead.errors import CorruptData

T = TypeVar("T")


class Ask(NamedTuple):
    """Up to ``length`` bytes of one file, from ``offset``; fewer only at its end."""

    file: str
    offset: int
    length: int


Reading = Generator[Ask, bytes, T]
Fetch = Callable[[str, int, int], Awaitable[bytes]]
Read = Callable[[str, int, int], bytes]


class File(NamedTuple):
    """One file of a model: its name in the model's folder, its size in bytes where known, and what it is for."""

    name: str
    size: int | None
    role: str = "weights"
    format: str = ""


def run(reading: Reading[T], read: Read) -> T:
    """Drive a reader with a function that blocks."""
    try:
        ask = next(reading)
        while True:
            ask = reading.send(read(*ask)[: ask.length])
    except StopIteration as end:
        result: T = end.value
        return result


async def run_remote(reading: Reading[T], fetch: Fetch) -> T:
    """Drive a reader with range requests."""
    try:
        ask = next(reading)
        while True:
            ask = reading.send((await fetch(*ask))[: ask.length])
    except StopIteration as end:
        result: T = end.value
        return result


def unusable(kind: str, message: str, hint: str | None = None) -> NoReturn:
    """Refuse a file: ``message`` continues the words "not a usable KIND file: "."""
    raise CorruptData(f"not a usable {kind} file: {message}", hint=hint or "Get the file again, or ask its author.")


def exactly(kind: str, file: File, offset: int, length: int) -> Reading[bytes]:
    """All of these bytes; CorruptData when the file ends before."""
    found = bytearray()
    while len(found) < length:
        data = yield Ask(file.name, offset + len(found), length - len(found))
        if not data:
            unusable(kind, f"it ends at byte {offset + len(found)}, {offset + length} are needed")
        found += data
    return bytes(found)


def document(file: File, limit: int) -> Reading[dict[str, Any]]:
    """A JSON object that is a whole file of at most ``limit`` bytes; CorruptData for anything else."""
    data = yield from text(file, limit)
    return json_object("JSON", data)


def text(file: File, limit: int) -> Reading[bytes]:
    """A small file, whole."""
    if file.size is not None and file.size > limit:
        unusable("JSON" if file.name.endswith(".json") else "text", f"{file.name} is larger than {limit} bytes")
    found = bytearray()
    while len(found) <= limit:
        data = yield Ask(file.name, len(found), limit + 1 - len(found))
        if not data:
            break
        found += data
        if file.size is not None and len(found) >= file.size:
            break
    if len(found) > limit:
        unusable("text", f"{file.name} is larger than {limit} bytes")
    return bytes(found)


def json_object(kind: str, data: bytes) -> dict[str, Any]:
    """An object of JSON in which no key appears twice."""
    try:
        found = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:
        unusable(kind, f"what should be JSON is not: {str(exc)[:100]}")
    if not isinstance(found, dict):
        unusable(kind, "what should be a JSON object is not one")
    return found  # pyright: ignore[reportUnknownVariableType]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice[:80]!r} appears twice")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")
