"""What the usage journals below a folder say: their files and lines, for whoever sums them; writes nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

SUFFIX = ".journal"


class Line(msgspec.Struct, array_like=True, frozen=True):
    """One request as the journal has it; ``cost`` in millionths, ``time`` its end in Unix seconds."""

    time: float
    id: str
    key: str
    operation: str
    model: str
    status: int
    ok: bool
    prompt: int
    cached: int
    completion: int
    cost: int
    seconds: float
    revision: str = ""


def files(folder: Path) -> list[tuple[Path, int]]:
    """The journals below ``folder``, oldest first, with their sizes."""
    found: list[tuple[Path, int]] = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    found.append((Path(entry.path), entry.stat().st_size))
    return sorted(found)


def sealed(fd: int) -> bool:
    """Whether nobody writes to a journal any more: its gateway went on, ended or was killed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lines(raw: bytes) -> tuple[list[Line], int, int]:
    """(the lines that are whole, bytes taken, damaged lines) at the beginning of ``raw``."""
    nul = raw.find(b"\0")
    taken = raw.rfind(b"\n", 0, nul if nul >= 0 else len(raw)) + 1
    whole = raw[:taken]
    try:
        return _decode.decode_lines(whole), taken, 0
    except (msgspec.MsgspecError, UnicodeDecodeError):
        good = list(_salvaged(whole))
        return good, taken, whole.count(b"\n") - len(good)


def _salvaged(whole: bytes) -> Iterator[Line]:
    for line in whole.splitlines():
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            yield _decode.decode(line)


_decode = msgspec.json.Decoder(Line)
