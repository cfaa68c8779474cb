"""What a scan of a model's files found: plain records; looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["unsafe", "warning"]


@dataclass(frozen=True)
class Finding:
    """``unsafe`` runs code of the file's author when it is loaded, or may; ``warning`` is what a reader should know.

    ``file`` is the path inside the model (``archive!member`` inside archives), ``reason`` one line.
    """

    file: str
    severity: Severity
    reason: str


def short(text: str, limit: int = 120) -> str:
    """Foreign words for a message: printable, on one line, not too long."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}…"
