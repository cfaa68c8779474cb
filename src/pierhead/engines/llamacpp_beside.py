"""Models that llama.cpp uses beside the one it serves, one that drafts and LoRAs: what it is told of them; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pierhead.engines.base import Adapter, Beside, Mount, PlanRequest
from pierhead.errors import UsageError
from pierhead.formats.estimate import Estimate, estimate

MOUNT = "/beside"
_CLOSE = 128  # tokens by which the vocabularies of two models may differ, as llama.cpp has it


class Companions(NamedTuple):
    """``settings`` of the engine's entry, words of its command line, mounts, bytes of memory, and named adapters."""

    settings: dict[str, Any]
    argv: tuple[str, ...]
    mounts: tuple[Mount, ...]
    memory: int
    adapters: tuple[Adapter, ...]


def companions(request: PlanRequest, settings: dict[str, Any], context: int, sizing: Mapping[str, Any]) -> Companions:
    """What comes beside; takes ``draft`` out of ``settings``. ``context`` is the largest that may be chosen."""
    made: dict[str, Any] = {}
    memory = sum(f.size for f in request.files if f.role in ("lora", "draft"))
    name = settings.pop("draft", "")
    inside = next((f.name for f in request.files if f.role == "draft"), None)
    drafts = [b for b in request.beside if b.role == "draft"]
    if drafts:
        place = request.beside.index(drafts[0])
        _check_draft(request, drafts[0])
        made["draft"] = {"beside": place, "file": min(_gguf(drafts[0]))}
        memory += _draft_memory(drafts[0], context, sizing)
    elif name:
        raise UsageError(f"the drafting model '{name}' is not at hand", hint=f"Try: pier pull {name}")
    elif inside is not None:
        made["draft"] = {"file": inside}
        memory += _packaged_memory(request, context, sizing)
    loras = [(at, b) for at, b in enumerate(request.beside) if b.role == "lora"]
    given = settings.pop("lora", None)
    if given is None:
        given = [{"file": f.name, "scale": f.scale} for f in request.files if f.role == "lora"]
    adapters: list[Adapter] = []
    for _, lora in loras:
        _check_lora(request, lora)
        adapters.append(Adapter(lora.name, id=len(given) + len(adapters)))
        memory += sum(f.size for f in lora.files if f.role == "lora")
    listed = [{"beside": at, "file": min(f.name for f in b.files if f.role == "lora"), "scale": 0.0} for at, b in loras]
    if given or listed:
        made["lora"] = [*given, *listed]
    mounts = tuple(Mount(str(b.folder), f"{MOUNT}/{at}") for at, b in enumerate(request.beside))
    argv = tuple(word for at in range(len(mounts)) for word in ("--beside", f"$(MOUNT{at})"))
    return Companions(made, argv, mounts, memory, tuple(adapters))


def _gguf(beside: Beside) -> list[str]:
    return [f.name for f in beside.files if f.role == "weights" and f.format in ("gguf", "")]


def _check_draft(request: PlanRequest, draft: Beside) -> None:
    """The vocabularies must be the same but for a few tokens at the end; llama.cpp compares their words."""
    if not _gguf(draft):
        raise UsageError(f"'{draft.name}' cannot draft: it has no GGUF weights", hint="Name a smaller GGUF model.")
    ours, theirs = request.metadata, draft.metadata
    sizes = [int(m.get("vocab_size") or 0) for m in (ours, theirs)]
    kinds = [str(m.get("tokenizer") or "") for m in (ours, theirs)]
    differ = all(kinds) and kinds[0] != kinds[1]
    if differ or (all(sizes) and abs(sizes[0] - sizes[1]) > _CLOSE):
        raise UsageError(
            f"'{draft.name}' cannot draft for '{request.model}': its vocabulary is another "
            f"({kinds[1]} with {sizes[1]:,} tokens, not {kinds[0]} with {sizes[0]:,})",
            hint="Name a smaller model of the same family.",
            data={"draft": draft.name, "tokens": sizes, "tokenizers": kinds},
        )


def _draft_memory(draft: Beside, context: int, sizing: Mapping[str, Any]) -> int:
    """Its weights, its own cache for every slot, and its scratch memory; the program is there already."""
    needed = _needed(draft.metadata, context, sizing)
    return needed.total - needed.overhead


def _packaged_memory(request: PlanRequest, context: int, sizing: Mapping[str, Any]) -> int:
    """Cache and scratch memory of a draft that came with the model, of which only the size is known.

    They are reckoned from the model's own: these grow with layers and width, weights with layers and width squared.
    """
    own = _needed(request.metadata, context, sizing)
    size = sum(f.size for f in request.files if f.role == "draft")
    share = min(1.0, size / max(1, own.weights)) ** (2 / 3)
    return round((own.total - own.overhead - own.weights) * share)


def _needed(metadata: Mapping[str, Any], context: int, sizing: Mapping[str, Any]) -> Estimate:
    same = {name: sizing[name] for name in ("parallel", "batch", "ubatch", "flash_attention", "processor")}
    return estimate(metadata, context=context, **same)


def _check_lora(request: PlanRequest, lora: Beside) -> None:
    ours, theirs = request.metadata.get("architecture"), lora.metadata.get("architecture")
    if not any(f.role == "lora" for f in lora.files):
        raise UsageError(f"'{lora.name}' is no LoRA adapter", hint="`pier lora list` shows those that are here.")
    if ours and theirs and ours != theirs:
        raise UsageError(
            f"'{lora.name}' is a LoRA for {theirs}, '{request.model}' is {ours}", hint="Name one that fits the model."
        )
