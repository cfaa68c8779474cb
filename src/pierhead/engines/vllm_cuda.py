"""What vLLM takes of NVIDIA's GPUs: a cache and a share that are right for the model, not all that is free; pure."""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pierhead.engines import gpus
from pierhead.engines.base import PlanRequest
from pierhead.engines.huggingface import kind, say
from pierhead.engines.vllm_beside import Companions
from pierhead.engines.vllm_params import Wishes
from pierhead.errors import UsageError
from pierhead.formats.safetensors_estimate import BLOCK, weights
from pierhead.formats.safetensors_gpu import Split, cache, estimate

MOST = 0.9  # of a GPU's memory that is planned for, where nobody says how long the texts are
SMALLEST = 512  # tokens: no default context is chosen below this
GIB = 1 << 30
# Compiling takes a minute or more at each start, since a sandbox forgets what it compiled. Most of what it would bring
# for few requests at a time comes from recorded graphs of the steps that write.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
_COMPILES = ("compilation_config", "optimization_level", "enforce_eager")
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Taken(NamedTuple):
    """What a plan takes: bytes of each GPU by CDI name, the context, and vLLM's flags that keep it to that."""

    devices: dict[str, int]
    context: int
    flags: dict[str, Any]


def take(request: PlanRequest, wishes: Wishes, beside: Companions, limit: int) -> Taken:
    """The GPUs for a model, whose context is at most ``limit`` tokens where nobody says; OutOfMemory where too full.

    Where the GPUs are not known, nothing is claimed, and vLLM takes its own share of what it is given.
    """
    flags = _working(request, wishes)
    total = gpus.largest(request.devices, wishes.gpus)
    split, context = _split(wishes.flags), wishes.context or limit
    if not total:
        return Taken(_claim(request, wishes, 0, split), context, flags)  # refuses what the machine has not
    share = wishes.flags.get("gpu_memory_utilization")
    if share is not None:  # the user says what is taken of each
        need = int(total * min(max(float(share), 0.0), 1.0))
        return Taken(_claim(request, wishes, need, split), context, flags)
    sizing = _sizing(request, wishes, beside, context, total, split)
    fixed = estimate(request.metadata, cached=0, **sizing).total
    room = _Room(request, wishes, sizing, fixed)
    if wishes.context:
        cached = room.tokens(min(int(total * MOST), total), context)
    else:
        cached = room.tokens(min(int(total * MOST), gpus.emptiest(request.devices, wishes.gpus, split.gpus)), context)
        context = min(context, max(cached // BLOCK * BLOCK, min(SMALLEST, limit)))
    size = room.size(max(cached, context))
    devices = _claim(request, wishes, fixed + size, split)
    flags |= {"kv_cache_memory_bytes": str(max(size, 1 << 20))}
    # vLLM starts only where that share of a GPU is free; what it takes follows from the rest.
    flags |= {"gpu_memory_utilization": max(int((fixed + size) / total * 10_000), 1) / 10_000}
    if "max_num_batched_tokens" not in wishes.flags and not sizing["sees"]:
        flags |= {"max_num_batched_tokens": str(sizing["batch"])}
    return Taken(devices, context, flags)


def _working(request: PlanRequest, wishes: Wishes) -> dict[str, Any]:
    """How it is to work, where nobody says: models that read have no steps that could be recorded."""
    if any(name in wishes.flags for name in _COMPILES):
        return {}
    return {"enforce_eager": True} if _reads(request, wishes) else {"compilation_config": GRAPHS}


def _reads(request: PlanRequest, wishes: Wishes) -> bool:
    """Whether it makes no texts, but vectors or classes of them."""
    asked = wishes.flags.get("runner") == "pooling" or wishes.flags.get("convert", "auto") not in ("auto", "none")
    return asked or kind(request.metadata) not in ("chat", "write")


class _Room(NamedTuple):
    """The cache of a model and of the one that drafts for it."""

    request: PlanRequest
    wishes: Wishes
    sizing: Mapping[str, Any]
    fixed: int  # bytes of all the rest

    def size(self, tokens: int) -> int:
        """Bytes of the cache for ``tokens``."""
        return sum(cache(summary, cached=tokens, **self._options()) for summary in self._models())

    def tokens(self, free: int, context: int) -> int:
        """How many tokens it is to hold: what a user says, else some whole contexts; no more than fit into ``free``."""
        wanted = self.wishes.cached or context * self.wishes.held
        if self.wishes.cached or self.fixed + self.size(wanted) <= free:
            return wanted
        return max(0, bisect.bisect_right(range(wanted + 1), free - self.fixed, key=self.size) - 1)

    def _models(self) -> list[Mapping[str, Any]]:
        drafts = [b.metadata for b in self.request.beside if b.role == "draft" and self.wishes.draft]
        return [self.request.metadata, *drafts]

    def _options(self) -> dict[str, Any]:
        return {name: self.sizing[name] for name in ("parallel", "cache_bytes", "split")}


def _sizing(
    request: PlanRequest, wishes: Wishes, beside: Companions, context: int, total: int, split: Split
) -> dict[str, Any]:
    """How the estimate is to be made."""
    inside = sum(f.size for f in request.files if f.role in ("lora", "draft"))
    away = int(float(wishes.flags.get("cpu_offload_gb", 0.0)) * GIB) * split.gpus
    sees = "vision" in say(request.metadata)
    return {
        "parallel": wishes.parallel,
        "batch": 2 * _batch(request, wishes, context, total) if sees else _batch(request, wishes, context, total),
        "cache_bytes": wishes.cache_bytes,
        "full": wishes.full,
        "extra_weights": max(inside + beside.resident - away, -weights(request.metadata, wishes.full)),
        "sees": sees,
        "split": split,
    }


def _batch(request: PlanRequest, wishes: Wishes, context: int, total: int) -> int:
    """Tokens of one step: as many as vLLM takes on a GPU of this size; a text that is read is not cut into steps."""
    if (said := wishes.flags.get("max_num_batched_tokens")) is not None:
        return _count(str(said))
    usual = 8192 if total >= 70 * GIB else 2048
    whole = context if _reads(request, wishes) else 1
    return max(min(usual, context * wishes.parallel), whole, wishes.parallel)


def _split(flags: Mapping[str, Any]) -> Split:
    found = Split(int(flags.get("tensor_parallel_size", 1)), int(flags.get("pipeline_parallel_size", 1)))
    if found.tensor < 1 or found.pipeline < 1:
        raise UsageError("a model is spread over one GPU at least", hint="Leave tensor-parallel-size out, or set 1.")
    return found


def _claim(request: PlanRequest, wishes: Wishes, need: int, split: Split) -> dict[str, int]:
    count = split.gpus * max(1, int(wishes.flags.get("data_parallel_size", 1)))
    return gpus.take(request.model, request.devices, need, count=count, among=wishes.gpus)


def _count(text: str) -> int:
    """A size as vLLM reads it; 8192 for what it chooses itself."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text)
    return int(float(found[1]) * _SCALE[found[2]]) if found else 8192
