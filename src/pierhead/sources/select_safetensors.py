"""Models in safetensors: shards, precisions (``model.fp16.safetensors``) and pipelines of several models; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pierhead.sources.choose import Entry
from pierhead.sources.variant import Variant, folder_of, name_of

_FILE = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<kind>fp16|bf16|fp32|fp8|int8|non_ema))?(?:-\d{5}-of-\d{5}(?:\.(?P<late>fp16|bf16|fp32))?)?"
    r"\.safetensors",
    re.IGNORECASE,
)
_PLAIN = ("model", "diffusion_pytorch_model", "pytorch_model", "consolidated")  # the usual names, in order
_ADAPTER = "adapter_model"


def safetensors_variants(entries: Sequence[Entry]) -> list[Variant]:
    """The models of a repository, the one that is meant without a tag first."""
    paths = {e.path for e in entries}
    weights = [e for e in entries if e.path.lower().endswith(".safetensors") and not _hidden(e.path)]
    if "model_index.json" in paths:
        return _pipelines(entries, weights)
    top = [e for e in weights if "/" not in e.path]
    if not top:
        top = weights
    return _models(entries, top, [e for e in weights if "/" in e.path and e not in top])


def _hidden(path: str) -> bool:
    """Copies that training or other tools keep below a model."""
    first = path.partition("/")[0].lower() if "/" in path else ""
    return first.startswith(("checkpoint-", "original", "global_step", "runs", "metal", "."))


def _groups(weights: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """Files by the path of their model and their precision."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(weights, key=lambda e: e.path):
        match = _FILE.fullmatch(entry.path)
        if match is not None:
            kind = (match["kind"] or match["late"] or "").lower()
            found.setdefault((match["stem"], kind), []).append(entry)
    return found


def _models(entries: Sequence[Entry], top: Sequence[Entry], below: Sequence[Entry]) -> list[Variant]:
    groups = _groups(top)
    if len({stem for stem, _ in groups}) > 1:
        groups = {key: group for key, group in groups.items() if name_of(key[0]) != _ADAPTER}
    usual = next((stem for name in _PLAIN for stem, _ in groups if name_of(stem) == name), "")
    sharded_twice = {stem for stem, _ in groups if name_of(stem) == "consolidated"} if usual else set[str]()
    found: list[Variant] = []
    for (stem, kind), group in sorted(
        groups.items(), key=lambda item: (item[0][0] != usual, item[0][1] != "", item[0])
    ):
        if stem in sharded_twice and stem != usual:
            continue
        label = (
            kind
            if stem == usual or len({s for s, _ in groups}) == 1
            else "-".join(x for x in (name_of(stem), kind) if x)
        )
        modules = _modules(entries, below) if stem == usual else []
        weights = (*_best(group), *modules)
        aliases = () if kind else (name_of(stem).lower(),)
        sure = bool(usual) or len({s for s, _ in groups}) == 1
        found.append(Variant(label, weights, aliases, _indexes(entries, weights), sure=sure))
    return found


def _best(group: Sequence[Entry]) -> list[Entry]:
    """One file and shards of the same name hold the same weights: the shards are left out."""
    whole = [e for e in group if "-of-" not in name_of(e.path)]
    return whole or list(group)


def _modules(entries: Sequence[Entry], below: Sequence[Entry]) -> list[Entry]:
    """The layers that sentence transformers keep in numbered folders (``2_Dense``)."""
    if not any(e.path == "modules.json" for e in entries):
        return []
    return [e for e in below if re.fullmatch(r"\d+_\w+/model\.safetensors", e.path)]


def _pipelines(entries: Sequence[Entry], weights: Sequence[Entry]) -> list[Variant]:
    """Each precision that all models of a pipeline have, or have next to a plain one."""
    below = [e for e in weights if "/" in e.path]
    groups = _groups(below)
    kinds = sorted({kind for _, kind in groups}, key=lambda kind: (kind != "", kind))
    folders = {folder_of(e.path) for e in below}
    found: list[Variant] = []
    for kind in kinds:
        chosen: list[Entry] = []
        for folder in sorted(folders):
            inside = {key: group for key, group in groups.items() if folder_of(key[0]) == folder}
            mine = [g for (_, k), g in inside.items() if k == kind] or [g for (_, k), g in inside.items() if not k]
            for group in mine:
                chosen += _best(group)
        if chosen:
            found.append(Variant(kind, tuple(chosen), (), _indexes(entries, chosen), pipeline=True))
    return found


def _indexes(entries: Sequence[Entry], weights: Sequence[Entry]) -> frozenset[str]:
    """The lists of shards that tell of these weights."""
    stems = {
        (folder_of(e.path), m["stem"], m["kind"] or m["late"] or "") for e in weights if (m := _FILE.fullmatch(e.path))
    }
    found: set[str] = set()
    if all("-of-" not in name_of(e.path) for e in weights):
        return frozenset()
    for entry in entries:
        match = re.fullmatch(r"(?P<stem>.+?)\.safetensors\.index(?:\.(?P<kind>\w+))?\.json", entry.path)
        if match and (folder_of(entry.path), match["stem"], match["kind"] or "") in stems:
            found.add(entry.path)
    return frozenset(found)
