"""The processes below one, found without looking at all processes of the machine; ends none."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil


def below(pid: int) -> list[psutil.Process]:
    """What ``pid`` started and what that started, the innermost last; empty when it is gone."""
    try:
        numbers = _descend(pid)
    except FileNotFoundError:  # it is gone, or this kernel does not tell
        try:
            return psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            return []
    found: list[psutil.Process] = []
    for number in numbers:
        with contextlib.suppress(psutil.Error):
            found.append(psutil.Process(number))
    return found


def _descend(pid: int) -> list[int]:
    found: list[int] = []
    row = [pid]
    while row:
        nearest = [child for parent in row for child in _children(parent, first=parent == pid)]
        found += nearest
        row = nearest
    return found


def _children(pid: int, *, first: bool) -> list[int]:
    """Those that any thread of it started; FileNotFoundError only for the ``first``: others may just have ended."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        if first:
            raise FileNotFoundError from None
    return sorted(found)
