"""Models that vLLM uses beside the one it serves, one that drafts and LoRAs: what it is told of them; pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pierhead.engines.base import Adapter, Beside, Loading, Mount, PlanRequest
from pierhead.engines.huggingface import adapters, is_model
from pierhead.engines.vllm_params import Wishes
from pierhead.errors import UsageError
from pierhead.formats.safetensors_estimate import cache_size, estimate
from pierhead.formats.shape import Facts

BESIDE = "/beside"
ADAPTERS = "/adapters"
DRAFTED = 4  # tokens at a time where nobody says
BATCHED = 4  # adapters that requests of one step can use
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be told
_PLACE = "\0"  # stands for the model's folder until what the user wrote is made harmless


class Companions(NamedTuple):
    """``flags`` for the table, ``words`` of the command line besides, and what they need in bytes.

    ``resident`` are those that stay, less the drafting model's cache and what it works with. ``work`` is the place of
    the folder that the server runs in, so that it knows what comes later by a bare name.
    """

    flags: dict[str, Any]
    words: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    work: str = ""
    cache: int = 0
    memory: int = 0
    resident: int = 0
    own: tuple[Adapter, ...] = ()
    loading: Loading | None = None


def companions(request: PlanRequest, wishes: Wishes, context: int) -> Companions:
    """What comes beside a model; ``context`` is the largest that may be chosen."""
    drafting = _drafting(request, wishes, context)
    lora = _lora(request, wishes, len(drafting.mounts))
    return Companions(
        flags={**drafting.flags, **lora.flags},
        words=(*drafting.words, *lora.words),
        mounts=(*drafting.mounts, *lora.mounts),
        work=lora.work,
        cache=drafting.cache,
        memory=drafting.memory + lora.memory,
        resident=drafting.resident + lora.memory,
        own=lora.own,
        loading=lora.loading,
    )


# --- a model that drafts ----------------------------------------------------------------------------------------------


def _drafting(request: PlanRequest, wishes: Wishes, context: int) -> Companions:
    given: Any = wishes.flags.get("speculative_config")
    ways = [bool(given), bool(wishes.draft), wishes.ngram]
    if sum(ways) > 1:
        raise UsageError(
            "tokens can be drafted in one way only", hint="Choose one of draft, ngram and speculative-config."
        )
    if wishes.ngram:
        told = {"method": "ngram", "num_speculative_tokens": wishes.drafted or DRAFTED, "prompt_lookup_max": 4}
        return Companions({"speculative_config": {**told, "prompt_lookup_min": 2}})
    if wishes.draft:
        return _draft(request, wishes, context)
    if isinstance(given, dict) and "model" in given:
        config: dict[str, Any] = {**given, "model": _inside(request, str(given["model"]))}  # pyright: ignore[reportUnknownArgumentType]
        return Companions({}, (f"--speculative-config={_json(config)}",))
    return Companions({})


def _draft(request: PlanRequest, wishes: Wishes, context: int) -> Companions:
    draft = next((b for b in request.beside if b.role == "draft"), None)
    if draft is None:
        raise UsageError(f"the drafting model '{wishes.draft}' is not at hand", hint=f"Try: pier pull {wishes.draft}")
    _check_draft(request, draft)
    told = {"method": "draft_model", "model": "$(MOUNT0)", "num_speculative_tokens": wishes.drafted or DRAFTED}
    sizing: dict[str, Any] = {"context": context, "parallel": wishes.held, "cache_bytes": wishes.cache_bytes}
    cache = cache_size(draft.metadata, **sizing)
    needed = estimate(draft.metadata, full=wishes.full, program=0, **sizing)
    return Companions(
        {},
        (f"--speculative-config={json.dumps(told, separators=(',', ':'))}",),
        (Mount(str(draft.folder), f"{BESIDE}/0"),),
        cache=cache,
        memory=needed.total,
        resident=needed.weights,
    )


def _check_draft(request: PlanRequest, draft: Beside) -> None:
    """UsageError unless it is of vLLM's format and has the same vocabulary."""
    if not is_model(draft.files):
        raise UsageError(
            f"'{draft.name}' cannot draft: it has no safetensors weights", hint="Name a smaller model in safetensors."
        )
    sizes = [Facts(m).number("vocab_size") for m in (request.metadata, draft.metadata)]
    if all(sizes) and sizes[0] != sizes[1]:
        raise UsageError(
            f"'{draft.name}' cannot draft for '{request.model}': "
            f"its vocabulary has {sizes[1]:,} tokens, not {sizes[0]:,}",
            hint="Name a smaller model of the same family.",
            data={"draft": draft.name, "tokens": sizes},
        )


# --- LoRAs ------------------------------------------------------------------------------------------------------------


def _lora(request: PlanRequest, wishes: Wishes, at: int) -> Companions:
    own = {**adapters(request.files), **wishes.lora}
    wanted = [b for b in request.beside if b.role == "lora"]
    if not own and not wanted and not wishes.enable_lora:
        return Companions({})
    rank = max((Facts(b.metadata).number("rank") for b in wanted), default=0)
    told = [_json({"name": name, "path": _inside(request, folder)}) for name, folder in own.items()]
    flags: dict[str, Any] = {"enable_lora": True, "max_loras": min(BATCHED, wishes.parallel), "max_cpu_loras": 16}
    flags |= {"max_lora_rank": next((r for r in RANKS if r >= max(rank, 16)), RANKS[-1])}
    flags |= {name: wishes.flags[name] for name in flags if name in wishes.flags}
    mounts: tuple[Mount, ...] = ()
    loading = None
    if request.adapters is not None:
        mounts, loading = (Mount(str(request.adapters), ADAPTERS),), Loading(str(request.adapters))
    return Companions(
        flags,
        ("--lora-modules", *told) if told else (),
        mounts,
        work=f"$(MOUNT{at})" if mounts else "",
        memory=_lora_memory(request.metadata, flags) + sum(f.size for b in wanted for f in b.files),
        own=tuple(Adapter(name, model=name) for name in own),
        loading=loading,
    )


def _lora_memory(metadata: Mapping[str, Any], flags: Mapping[str, Any]) -> int:
    """The slots that vLLM keeps for adapters in every linear layer, in 16 bits, whoever uses them."""
    facts = Facts(metadata)
    width, inner = facts.number("embedding_length"), facts.number("ffn_width")
    per_rank = facts.number("layers") * (8 * width + 3 * (width + inner)) + facts.number("vocab_size") + width
    return 2 * flags["max_loras"] * flags["max_lora_rank"] * per_rank


def _inside(request: PlanRequest, folder: str) -> str:
    """A folder of the model, as the server finds it."""
    names = {f.name for f in request.files}
    if not any(name.startswith(f"{folder}/") for name in names):
        raise UsageError(
            f"the model '{request.model}' has no folder '{folder}'", hint=f"It has: {', '.join(sorted(names))[:500]}."
        )
    return f"{_PLACE}/{folder}"


def _json(told: Mapping[str, Any]) -> str:
    """As one word in which only our own places are places."""
    text = json.dumps(told, separators=(",", ":")).replace("$(", "$$(")
    return text.replace(json.dumps(_PLACE)[1:-1], "$(MODEL_DIR)")
