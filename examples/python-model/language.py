# /// script
# dependencies = ["numpy>=2"]
# ///
"""Which language a sentence is in, by its letters: a Python model with weights beside it.

Try it:

    pier run ./examples/python-model "Guten Morgen"
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field


class Sentence(BaseModel):
    """What is asked."""

    text: str = Field(min_length=1, max_length=10_000)


class Language(BaseModel):
    """The answer: the likeliest language, and how likely each is."""

    language: str
    probabilities: dict[str, float]


class Languages:
    """Tells English, German and French apart by pairs of letters."""

    max_batch_size = 32
    batch_delay_ms = 1

    def load(self, folder: str) -> None:
        samples: dict[str, str] = json.loads((Path(folder) / "samples.json").read_text(encoding="utf-8"))
        self.names = list(samples)
        self.pairs = {pair: at for at, pair in enumerate(sorted({p for text in samples.values() for p in pairs(text)}))}
        counts = np.array([self.counted(text) for text in samples.values()]) + 0.1
        self.weights = np.log(counts / counts.sum(axis=1, keepdims=True))

    def counted(self, text: str) -> np.ndarray:
        found = np.zeros(len(self.pairs))
        for pair in pairs(text):
            if pair in self.pairs:
                found[self.pairs[pair]] += 1
        return found

    def predict(self, sentences: list[Sentence]) -> list[Language]:
        scores = np.array([self.counted(s.text) for s in sentences]) @ self.weights.T
        likely = np.exp(scores - scores.max(axis=1, keepdims=True))
        likely /= likely.sum(axis=1, keepdims=True)
        return [
            Language(
                language=self.names[int(row.argmax())], probabilities=dict(zip(self.names, row.tolist(), strict=True))
            )
            for row in likely
        ]

    def classify(self, texts: list[str]) -> list[dict[str, float]]:
        return [found.probabilities for found in self.predict([Sentence(text=text) for text in texts])]

    def chat(self, messages: list[dict[str, Any]]) -> Iterator[str]:
        (found,) = self.predict([Sentence(text=messages[-1]["content"])])
        yield f"That is {found.language}, "
        yield f"I am {max(found.probabilities.values()):.0%} sure."


def pairs(text: str) -> list[str]:
    """Neighbouring letters."""
    plain = f" {' '.join(text.lower().split())} "
    return [plain[at : at + 2] for at in range(len(plain) - 1)]
