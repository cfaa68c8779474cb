"""The access log: one JSON line a request, to stderr or to a file that is rotated by size; decides nothing."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from pierhead.gateway.outcome import Outcome

KEPT = 4  # earlier files, as PATH.1 (the newest) to PATH.4
_encode = msgspec.json.Encoder().encode


class LogFile:
    """``target`` is true for stderr, else a path; a file that was moved away is followed by a new one."""

    def __init__(self, target: bool | str, most: int) -> None:
        self._path = Path(target) if isinstance(target, str) else None
        self._most = most
        self._fd = -1

    def write(self, lines: list[bytes]) -> int:
        """Write whole lines; how many were lost."""
        data = b"".join(lines)
        try:
            if self._path is None:
                sys.stderr.buffer.write(data)
                sys.stderr.buffer.flush()
            else:
                self._ready(self._path, len(data))
                view = memoryview(data)
                while view:
                    view = view[os.write(self._fd, view) :]
        except OSError:
            return len(lines)
        return 0

    def close(self) -> None:
        """The next line opens the file that has the name then."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _ready(self, path: Path, more: int) -> None:
        """An open file with room: a new one when another program moved it away, or when it is full."""
        if self._fd >= 0:
            mine = os.fstat(self._fd)
            there = None
            with contextlib.suppress(FileNotFoundError):
                there = path.stat()
            if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
                self.close()
            elif mine.st_size and mine.st_size + more > self._most:
                self.close()
                rotate(path)
        if self._fd < 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def rotate(path: Path) -> None:
    """PATH becomes PATH.1, PATH.1 becomes PATH.2, and so on; the oldest one goes."""
    for number in range(KEPT, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        newer = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
        with contextlib.suppress(FileNotFoundError):
            newer.rename(older)


def line(outcome: Outcome) -> bytes:
    """One request; ``bytes`` are the answer's body's. What says nothing is left out."""
    usage = outcome.usage
    facts: dict[str, Any] = {
        "time": round(outcome.time, 3),
        "id": outcome.id,
        "peer": outcome.peer,
        "method": outcome.method,
        "path": outcome.path,
        "operation": outcome.operation,
        "status": outcome.status,
        "ok": outcome.ok,
        "model": outcome.model,
        "replica": outcome.replica,
        "key": outcome.key,
        "stream": outcome.stream,
        "bytes": outcome.sent,
        "seconds": round(outcome.seconds, 6),
        "queued": round(outcome.queued, 6),
    }
    if usage.known:
        facts |= {
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.completion,
        }
    if outcome.asked != outcome.model:
        facts["asked"] = outcome.asked
    if outcome.ttft:
        facts["ttft"] = round(outcome.ttft, 6)
    if outcome.cost:
        facts["cost"] = outcome.cost / 1e6
    if outcome.n != 1:
        facts["n"] = outcome.n
    for name in ("code", "finish", "route", "fallback", "revision", "retries", "hit", "trace"):
        value = getattr(outcome, name)
        if value:
            facts[name] = value
    return _encode(facts) + b"\n"


def local_line(facts: dict[str, Any]) -> bytes:
    """One answer that no model gave."""
    return _encode(facts) + b"\n"
