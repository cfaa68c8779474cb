"""What others wrote, read within bounds: JSON, text, and small files in their folders; knows none of their formats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from pierhead.errors import CorruptData
from pierhead.store.files import opened_beneath

T = TypeVar("T")


def decode(data: bytes, kind: type[T], what: str) -> T:
    """JSON from elsewhere; CorruptData for what is damaged, of another shape or nested without end."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise CorruptData(f"{what} cannot be read: {exc}"[:300]) from exc


def text(data: bytes, what: str) -> str:
    """Text from elsewhere."""
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise CorruptData(f"{what} is not text") from exc


def read_beneath(root: Path, relative: str, limit: int) -> bytes:
    """A small file of a folder that another program owns; CorruptData when it is larger than ``limit``."""
    with opened_beneath(root, relative) as handle, os.fdopen(os.dup(handle), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CorruptData(f"{root / relative} is larger than such a file may be")
    return data
