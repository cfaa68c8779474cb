"""The one gate that every model's files pass before they get a name: what runs code is refused unless asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from pierhead.errors import UnsafeContent
from pierhead.formats.findings import Finding
from pierhead.formats.scan import scan_files

SHOWN = 5


def check(files: Iterable[tuple[str, Path]], *, allow: bool, again: str) -> tuple[list[Finding], str]:
    """Scan files by name; UnsafeContent when one would run code and that was not allowed. Blocks.

    ``again`` is the command that allows it. Returns the findings, and the text that remembers what was allowed.
    """
    found = scan_files(files)
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
