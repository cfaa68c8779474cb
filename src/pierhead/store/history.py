"""Where names pointed, and when: a log beside ``index.json`` that survives torn writes; decides nothing.

A line is written before the index changes. One that no index followed (the process died between the two) is passed
over: the next line of that name, or the index itself, tells what the name pointed to.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from pierhead.store.files import replace, sync_folder

ASKING = frozenset({"pull", "check"})  # the verbs that ask a source
MAX_BYTES = 8 << 20  # then the older half goes


class Move(msgspec.Struct, frozen=True):
    """A name was pointed to ``digest`` (empty: removed) at ``time`` (ISO 8601 UTC); ``was`` is what it had before.

    ``by`` is the verb: pull, package, tag, import, rm, check. One that found nothing new has ``was == digest``; the
    ``source`` of a check is what the source gave out then.
    """

    time: str
    name: str
    digest: str
    was: str = ""
    by: str = ""
    source: str = ""


class History:
    """The log file; callers hold the index's lock when they write."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, name: str, digest: str, *, was: str, by: str, source: str = "") -> None:
        """Append one line, durably."""
        line = msgspec.json.encode(Move(now(), name, digest, was, by, source)) + b"\n"
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # the last writer died in the middle of its line
            os.write(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)
        if not size:
            sync_folder(self._path.parent)
        if size > MAX_BYTES:
            lines = self._path.read_bytes().splitlines(keepends=True)
            half = len(lines) // 2
            replace(self._path, b"".join((*self._origins(lines[:half]), *lines[half:])))

    def _origins(self, lines: Sequence[bytes]) -> list[bytes]:
        """What must outlive its time: where a model that is still here was pulled from, which policies ask."""
        blobs = self._path.parent / "blobs" / "sha256"
        found: dict[tuple[str, str], bytes] = {}
        for line in lines:
            with contextlib.suppress(msgspec.DecodeError):
                move = msgspec.json.decode(line, type=Move)
                if move.by == "pull" and move.source and (blobs / move.digest.removeprefix("sha256:")).is_file():
                    found.setdefault((move.digest, move.source), line)
        return list(found.values())

    def of(self, name: str, current: str) -> list[Move]:
        """What happened to a name, the latest first; ``current`` is what the index says now (empty: no such name)."""
        found = [m for m in self._all() if m.name == name]
        true: list[Move] = []
        expected = current
        for move in reversed(found):
            if move.digest == expected:
                true.append(move)
                expected = move.was
        return true

    def sources(self, digest: str) -> tuple[str, ...]:
        """Where pulls brought a manifest from, as seen here; what a manifest says of itself does not count."""
        found = (m.source for m in self._all() if m.digest == digest and m.by == "pull" and m.source)
        return tuple(dict.fromkeys(found))

    @property
    def size(self) -> int:
        """Bytes; it changes with every line."""
        return self._path.stat().st_size if self._path.exists() else 0

    def looks(self, current: Mapping[str, str]) -> dict[str, Move]:
        """The last time that each name's source was asked about what the name means now (``current``: its digest)."""
        return {m.name: m for m in self._all() if m.by in ASKING and m.digest and current.get(m.name) == m.digest}

    def _all(self) -> list[Move]:
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        found: list[Move] = []
        for line in lines:
            try:
                found.append(msgspec.json.decode(line, type=Move))
            except msgspec.DecodeError:
                continue  # a torn line
        return found


def now() -> str:
    """The time as the log and manifests write it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
