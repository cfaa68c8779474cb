"""The metadata of a GGUF header as text, the way Docker's config shows it; pure."""

from __future__ import annotations

from pierhead.formats.gguf_parser import Header, Value

MOST_ELEMENTS = 50
MOST_TEXT = 1 << 20


def metadata_text(header: Header) -> dict[str, str]:
    """Each key of a header with its value in words; long arrays (a vocabulary) are left out."""
    return {
        key: _text(value)
        for key, value in header.metadata.items()
        if not (isinstance(value, tuple) and len(value) > MOST_ELEMENTS)
    }


def _text(value: Value) -> str:
    if isinstance(value, tuple):
        return ", ".join(_text(one) for one in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6f}" if isinstance(value, float) else str(value)[:MOST_TEXT]
