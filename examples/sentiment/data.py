"""Labelled sentences from the source package of vaderSentiment: reviews of films and products, and short messages.

Each was rated by twenty people from -4 to 4. Clear ones become NEGATIVE and POSITIVE; lukewarm ones are left out.
"""

from __future__ import annotations

import hashlib
import html
import tarfile
from pathlib import Path
from typing import NamedTuple

INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
PARTS = ("movieReviewSnippets", "amazonReviewSnippets", "tweets")
CLEAR = 0.5  # of a rating


class Sentence(NamedTuple):
    """``label`` is 1 for POSITIVE; ``held`` ones are for the examination only."""

    text: str
    label: int
    held: bool


def sentences(archive: Path) -> list[Sentence]:
    """All clear sentences, always in the same order and with the same tenth held back."""
    found: dict[str, Sentence] = {}
    with tarfile.open(archive) as outer:
        member = next(m for m in outer if m.name.endswith(INNER))
        file = outer.extractfile(member)
        assert file is not None
        with tarfile.open(fileobj=file) as inner:
            for part in PARTS:
                table = inner.extractfile(f"hutto_ICWSM_2014/{part}_GroundTruth.txt")
                assert table is not None
                for line in table.read().decode("utf-8").splitlines():
                    _, rating, text = line.split("\t", 2)
                    text = html.unescape(text).strip()
                    if abs(float(rating)) >= CLEAR and text:
                        held = hashlib.sha256(text.encode()).digest()[0] < 26  # a tenth, whatever the order
                        found[text] = Sentence(text, int(float(rating) > 0), held)
    return list(found.values())
