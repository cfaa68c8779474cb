"""How much of a GPU a server of safetensors models is given: context, cache and claim, right for the model; pure."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pierhead.engines import gpus
from pierhead.formats.safetensors_estimate import BLOCK
from pierhead.formats.safetensors_gpu import WHOLE, Split, cache, estimate

HELD = 8  # whole contexts that a cache holds: few requests are as long as they may be
MOST = 0.9  # of a GPU's memory that is planned for, where nobody says how long the texts are
SMALLEST = 512  # tokens: no default context is chosen below this


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a model is to have; ``context`` and ``cached`` are tokens, 0 where nobody says.

    ``models`` are the summaries of it and of one that drafts for it, ``held`` the whole contexts that are cached where
    nobody says more, ``limit`` the largest context that may be chosen. ``copies`` is how many times all of it is there.
    """

    models: Sequence[Mapping[str, Any]]
    parallel: int
    limit: int
    batch: int  # tokens of one step
    context: int = 0
    cached: int = 0
    held: int = HELD
    cache_bytes: float = 2.0
    full: bool = False
    extra_weights: int = 0
    sees: bool = False
    split: Split = WHOLE
    copies: int = 1
    gpus: Sequence[str] = ()

    @property
    def fixed(self) -> int:
        """Bytes of each GPU beside the cache."""
        return estimate(
            self.models[0],
            cached=0,
            parallel=self.parallel,
            batch=self.batch,
            full=self.full,
            extra_weights=self.extra_weights,
            sees=self.sees,
            split=self.split,
        ).total

    def size(self, tokens: int) -> int:
        """Bytes of each GPU's cache for so many."""
        options: dict[str, Any] = {"parallel": self.parallel, "cache_bytes": self.cache_bytes, "split": self.split}
        return sum(cache(summary, cached=tokens, **options) for summary in self.models)


class Share(NamedTuple):
    """Tokens of the context and of the cache, and bytes of each GPU: of the cache, and all of it."""

    context: int
    cached: int
    cache: int
    need: int


def share(wanted: Wanted, devices: Sequence[gpus.Device]) -> Share:
    """What is right on these GPUs; a context that nobody named is as long as fits."""
    fixed, count = wanted.fixed, wanted.split.gpus * wanted.copies
    free = int(gpus.largest(devices, wanted.gpus) * MOST)
    if not wanted.context:
        free = min(free, gpus.emptiest(devices, wanted.gpus, count))
    context = wanted.context or wanted.limit
    cached = wanted.cached or context * min(wanted.held, wanted.parallel)
    if not wanted.cached and fixed + wanted.size(cached) > free:
        cached = max(0, bisect.bisect_right(range(cached + 1), free - fixed, key=wanted.size) - 1)
    if not wanted.context:
        context = min(context, max(cached // BLOCK * BLOCK, min(SMALLEST, wanted.limit)))
    cached = max(cached, context)
    size = wanted.size(cached)
    return Share(context, cached, size, fixed + size)


def batch(devices: Sequence[gpus.Device], among: Sequence[str]) -> int:
    """Tokens of one step: as many as these servers take by themselves on a GPU of this size."""
    return 8192 if gpus.largest(devices, among) >= 70 << 30 else 2048


def claim(model: str, devices: Sequence[gpus.Device], need: int, wanted: Wanted) -> dict[str, int]:
    """``need`` bytes of each GPU that it is spread over; OutOfMemory or UsageError as ``gpus.take`` has them."""
    return gpus.take(model, devices, need, count=wanted.split.gpus * wanted.copies, among=wanted.gpus)
