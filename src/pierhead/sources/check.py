"""The one gate that every model's files pass before they get a name: what runs code is refused unless asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from pierhead.errors import UnsafeContent
from pierhead.formats import python_model
from pierhead.formats.findings import Finding
from pierhead.formats.scan import scan_files

SHOWN = 5
_PROGRAMS = frozenset({python_model.NAME})


def check(
    files: Iterable[tuple[str, Path]], *, allow: bool, again: str, vouched: bool = False
) -> tuple[list[Finding], str]:
    """Scan files by name; UnsafeContent when one would run code and that was not allowed. Blocks.

    ``again`` is the command that allows it. Of a model that somebody trusted has ``vouched`` for, or that the user made
    on this machine, the programs that it is made of are no finding. Returns the findings, and the text that remembers
    what was allowed.
    """
    found = [f for f in scan_files(files) if not (vouched and PurePosixPath(f.file).name in _PROGRAMS)]
    unsafe = [f for f in found if f.severity == "unsafe"]
    if unsafe and not allow:
        raise refusal(unsafe, again)
    return found, "; ".join(f"{f.file}: {f.reason}" for f in unsafe)[:2000]


def refusal(unsafe: Sequence[Finding], again: str) -> UnsafeContent:
    """What runs code, file by file, and how to take it in nevertheless."""
    lines = [f"{f.file}: {f.reason}" for f in unsafe[:SHOWN]]
    more = f"; and {len(unsafe) - SHOWN} more" if len(unsafe) > SHOWN else ""
    return UnsafeContent(
        f"this model would run code of its author: {'; '.join(lines)}{more}",
        hint=f"Look for one in GGUF or safetensors. If you trust its author: {again}",
        data={"findings": [msgspec.to_builtins(f) for f in unsafe]},
    )
