"""What vLLM takes of NVIDIA's GPUs: a cache and a share that are right for the model, not all that is free; pure."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from pierhead.engines import gpu_share, gpus
from pierhead.engines.base import PlanRequest
from pierhead.engines.gpu_share import Wanted
from pierhead.engines.huggingface import kind, say
from pierhead.engines.vllm_beside import Companions
from pierhead.engines.vllm_params import Wishes
from pierhead.errors import UsageError
from pierhead.formats.safetensors_estimate import weights
from pierhead.formats.safetensors_gpu import Split

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
    flags, wanted = _working(request, wishes), _wanted(request, wishes, beside, limit)
    total, devices = gpus.largest(request.devices, wishes.gpus), request.devices
    fraction = wishes.flags.get("gpu_memory_utilization")
    if not total or fraction is not None:  # refuses what the machine has not; the user says what is taken of each
        need = int(total * min(max(float(fraction or 0), 0.0), 1.0))
        return Taken(gpu_share.claim(request.model, devices, need, wanted), wishes.context or limit, flags)
    found = gpu_share.share(wanted, devices)
    claimed = gpu_share.claim(request.model, devices, found.need, wanted)
    flags |= {"kv_cache_memory_bytes": str(max(found.cache, 1 << 20))}
    # vLLM starts only where that share of a GPU is free; what it takes follows from the rest.
    flags |= {"gpu_memory_utilization": max(int(found.need / total * 10_000), 1) / 10_000}
    if "max_num_batched_tokens" not in wishes.flags and not wanted.sees:
        flags |= {"max_num_batched_tokens": str(wanted.batch)}
    return Taken(claimed, found.context, flags)


def _working(request: PlanRequest, wishes: Wishes) -> dict[str, Any]:
    """How it is to work, where nobody says: models that read have no steps that could be recorded."""
    if any(name in wishes.flags for name in _COMPILES):
        return {}
    return {"enforce_eager": True} if _reads(request, wishes) else {"compilation_config": GRAPHS}


def _reads(request: PlanRequest, wishes: Wishes) -> bool:
    """Whether it makes no texts, but vectors or classes of them."""
    asked = wishes.flags.get("runner") == "pooling" or wishes.flags.get("convert", "auto") not in ("auto", "none")
    return asked or kind(request.metadata) not in ("chat", "write")


def _wanted(request: PlanRequest, wishes: Wishes, beside: Companions, limit: int) -> Wanted:
    split = Split(_number(wishes, "tensor_parallel_size"), _number(wishes, "pipeline_parallel_size"))
    drafts = [b.metadata for b in request.beside if b.role == "draft" and wishes.draft]
    inside = sum(f.size for f in request.files if f.role in ("lora", "draft"))
    away = int(float(wishes.flags.get("cpu_offload_gb", 0.0)) * GIB) * split.gpus
    sees = "vision" in say(request.metadata)
    step = _batch(request, wishes, wishes.context or limit)
    return Wanted(
        models=[request.metadata, *drafts],
        parallel=wishes.parallel,
        limit=limit,
        batch=2 * step if sees else step,  # vLLM chooses by the largest picture
        context=wishes.context,
        cached=wishes.cached,
        held=wishes.held,
        cache_bytes=wishes.cache_bytes,
        full=wishes.full,
        extra_weights=max(inside + beside.resident - away, -weights(request.metadata, wishes.full)),
        sees=sees,
        split=split,
        copies=_number(wishes, "data_parallel_size"),
        gpus=wishes.gpus,
    )


def _batch(request: PlanRequest, wishes: Wishes, context: int) -> int:
    """Tokens of one step; a text that is read is not cut into steps."""
    if (said := wishes.flags.get("max_num_batched_tokens")) is not None:
        return _count(str(said))
    whole = context if _reads(request, wishes) else 1
    return max(min(gpu_share.batch(request.devices, wishes.gpus), context * wishes.parallel), whole, wishes.parallel)


def _number(wishes: Wishes, name: str) -> int:
    """Over how many GPUs something is spread."""
    found = int(wishes.flags.get(name, 1))
    if found < 1:
        word = name.replace("_", "-")
        raise UsageError(f"bad value {found} for engine parameter '{word}'", hint="Leave it out, or set 1 or more.")
    return found


def _count(text: str) -> int:
    """A size as vLLM reads it; 8192 for what it chooses itself."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text)
    return int(float(found[1]) * _SCALE[found[2]]) if found else 8192
