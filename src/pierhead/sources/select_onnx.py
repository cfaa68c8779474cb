"""Models in ONNX: precisions by the end of a graph's name, graphs that work together, weights beside them; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pierhead.sources.choose import Entry
from pierhead.sources.variant import Variant, folder_of, name_of

# Without a tag the first of these that a repository has is taken.
_ORDER = ("", "fp32", "fp16", "q8", "int8", "uint8", "q4f16", "q4", "bnb4")
_KIND = re.compile(
    r"(?i)(?P<stem>.+?)(?:[_.](?P<kind>fp16|fp32|bf16|q8|q8f16|q4|q4f16|q2|q2f16|int8|uint8|int4|bnb4|quantized|quant"
    r"|O[1-4]|q?u?int8_(?:avx512_vnni|avx512|avx2|arm64)))?\.onnx"
)
_ALIASES = {"quantized": "q8", "quant": "q8"}


def onnx_variants(entries: Sequence[Entry]) -> list[Variant]:
    """The models of a repository, the one that is meant without a tag first."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        found = _KIND.fullmatch(entry.path)
        if found is not None:
            kind = (found["kind"] or "").lower()
            groups.setdefault((folder_of(entry.path), _ALIASES.get(kind, kind)), []).append(entry)
    folders = {folder for folder, _ in groups}
    variants: list[Variant] = []
    for (folder, kind), graphs in groups.items():
        chosen = _together(graphs)
        place = "" if len(folders) == 1 or folder in ("", "onnx") else folder
        label = "-".join(x for x in (place.replace("/", "-"), kind) if x)
        weights = (*chosen, *(e for e in entries if _belongs(e, chosen)))
        aliases = [name_of(place).lower()] if place and not kind else []
        if not place:
            aliases += {"q8": ["quantized"], "": [] if (folder, "fp32") in groups else ["fp32"]}.get(kind, [])
        variants.append(Variant(label, weights, tuple(aliases)))
    return sorted(variants, key=_rank)


def _rank(variant: Variant) -> tuple[int, int, int, str]:
    folder = folder_of(variant.weights[0].path)
    place = 0 if folder == "onnx" else 1 if not folder else 2
    kind = variant.label if variant.label in _ORDER else None
    return (place, _ORDER.index(kind) if kind is not None else len(_ORDER), variant.size, variant.label)


def _together(graphs: Sequence[Entry]) -> list[Entry]:
    """Graphs of one model; where a merged decoder is among them, its two halves are not needed."""
    stems = {_stem(e): e for e in graphs}
    merged = {s.removesuffix("_merged") for s in stems if s.endswith("_merged")}
    halves = merged | {s.replace("decoder_model", "decoder_with_past_model") for s in merged}
    return [e for s, e in sorted(stems.items()) if s not in halves]


def _stem(entry: Entry) -> str:
    found = _KIND.fullmatch(name_of(entry.path))
    return found["stem"].lower() if found else name_of(entry.path)


def _belongs(entry: Entry, graphs: Sequence[Entry]) -> bool:
    """Whether a file holds weights of one of the graphs (``model.onnx_data``, ``model.onnx.data``, ``model.data``)."""
    name = entry.path
    for graph in graphs:
        stem = graph.path.removesuffix(".onnx")
        if name.startswith((f"{graph.path}_data", f"{graph.path}.data", f"{stem}.data", f"{stem}_data", f"{stem}.bin")):
            return True
    return False
