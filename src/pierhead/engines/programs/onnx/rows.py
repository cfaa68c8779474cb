"""A request's own tensors as runs that the model's memory was reckoned for; reads and writes no request."""

from __future__ import annotations

import importlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from .batching import Item
from .faults import Refused
from .graph import Graph

np: Any = importlib.import_module("numpy")
RUNS = 4096  # that one request may be


@dataclass(frozen=True)
class Bounds:
    """Of one run: rows, tokens, and bytes of all its tensors; ``longest`` row in tokens (0: as many as a run has)."""

    rows: int
    tokens: int
    size: int
    longest: int = 0

    def most(self, length: int, size: int) -> int:
        """Rows of a run, of which each has ``length`` tokens (0: it has none) and ``size`` bytes; 0: not even one."""
        if length > (self.longest or self.tokens) or size > self.size:
            return 0
        return max(1, min(self.rows, self.tokens // max(1, length), self.size // max(1, size)))


class Allowance:
    """What the outputs of one request may take, in bytes; called with each run's outputs."""

    def __init__(self, most: int) -> None:
        self._most = self._left = most

    def __call__(self, outputs: dict[str, Any]) -> None:
        self._left -= sum(array.nbytes for array in outputs.values())
        if self._left < 0:
            raise too_large(f"its answer is larger than {self._most >> 20} MiB; send fewer rows at a time")


def split(graph: Graph, feeds: dict[str, Any], bounds: Bounds) -> list[Item]:
    """Work for the batcher within the bounds; requests of the same shapes can share a run. Refused 413 where it cannot.

    A model that takes one shape only always gets it.
    """
    counts = {array.shape[0] for array in feeds.values() if array.ndim}
    rows = max(counts, default=1)
    length = _length(feeds)
    size = sum(map(_bytes, feeds.values()))
    most = bounds.most(length, -(-size // max(1, rows)))
    if not most and _free(graph):
        told = f"{length:,} tokens and " if length else ""
        raise too_large(f"a row of its tensors has {told}{size // max(1, rows):,} bytes, {_allowed(bounds, length)}")
    most = most or 1
    if not graph.batches or len(counts) != 1 or not rows:
        if rows > most and _free(graph, 0):
            raise too_large(f"its tensors have {rows:,} rows that cannot be taken apart, and {most:,} may be in a run")
        return [Item(feeds, key=object())]
    if rows > most * RUNS:
        raise too_large(f"its tensors have {rows:,} rows; send at most {most * RUNS:,} at a time")
    if most < bounds.rows:  # what shares a run with it counts by its bytes, too
        length = max(length, bounds.tokens // (most + 1) + 1)
    key: Hashable = tuple((name, feeds[name].shape[1:]) for name in sorted(feeds))
    return [
        Item(
            {name: array[at : at + most] for name, array in feeds.items()} if rows > most else feeds,
            length=max(1, length),
            rows=min(most, rows - at),
            key=key,
        )
        for at in range(0, rows, most)
    ]


def joined(items: list[Item], results: list[dict[str, Any]]) -> dict[str, Any]:
    """The outputs of a request from those of its runs."""
    if len(items) == 1:
        return results[0]
    made: dict[str, Any] = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        apart = all(part.shape[:1] == (item.rows,) for part, item in zip(parts, items, strict=True))
        if not apart or len({part.shape[1:] for part in parts}) != 1:
            raise too_large(f"the model does not keep its rows apart; send at most {items[0].rows} at a time")
        made[name] = np.concatenate(parts)
    return made


def too_large(why: str) -> Refused:
    return Refused(413, why, "too_large")


def _length(feeds: dict[str, Any]) -> int:
    """Tokens of a row; 0 where it is no text. What is beside the tokens may be longer, and then all are."""
    if "input_ids" not in feeds:
        return 0
    return max((array.shape[1] for array in feeds.values() if array.ndim == 2), default=1)


def _bytes(array: Any) -> int:
    if array.dtype.kind != "O":
        return int(array.nbytes)
    return 8 * array.size + sum(map(len, array.flat))


def _free(graph: Graph, first: int = 1) -> bool:
    """Whether whoever asks says how large a row is, or (``first`` 0) how many there are."""
    return any(not port.shape or -1 in port.shape[first:] for port in graph.inputs.values())


def _allowed(bounds: Bounds, length: int) -> str:
    tokens = f"{bounds.longest or bounds.tokens:,} and " if length else ""
    return f"at most {tokens}{bounds.size:,} may be (--option context and max-tensor-mb allow more)"
