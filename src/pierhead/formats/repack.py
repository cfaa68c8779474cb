"""Which weights llama.cpp keeps a second time on a processor, in a layout made for it; pure.

The file stays mapped beside these copies, so they count in addition. Source: ggml's
``ggml_repack_get_optimal_repack_type``; ``bench/estimates.py`` compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pierhead.formats.ggml import TENSOR_TYPES, row_bytes

_KINDS = {kind.name: kind for kind in TENSOR_TYPES.values()}
_ROWS = 8  # rows that are woven into one another

# By feature of the processor, as Linux names them: the types that have a layout for it.
_LAYOUTS: dict[str, frozenset[str]] = {
    "avx2": frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}),
    "avx512f": frozenset({"Q2_K"}),
    "amx_int8": frozenset({"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}),
    "asimddp": frozenset({"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"}),
}
# Rows of these are looked up, never multiplied.
_LOOKED_UP = ("token_embd.", "per_layer_token_embd.", "position_embd.", "token_types.")


def repacked(summary: Mapping[str, Any], processor: frozenset[str]) -> int:
    """Bytes of weights that are kept a second time on a processor with these features."""
    types = frozenset[str]().union(*(kinds for feature, kinds in _LAYOUTS.items() if feature in processor))
    return sum(size_of(shape) for shape in _multiplied(summary) if shape[0] in types and _fits(shape))


def _multiplied(summary: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """The type and dimensions of every matrix that is multiplied."""
    for row in cast("list[Mapping[str, Any]]", summary.get("per_layer") or []):
        for name, shape in cast("Mapping[str, Sequence[Any]]", row.get("tensors") or {}).items():
            if name.endswith(".weight"):
                yield from (shape for _ in row.get("layers", ()))
    other = cast("Mapping[str, Sequence[Any]]", summary.get("other") or {})
    tied = not any(name.startswith("output.") for name in other)  # then the embedding is the output's matrix as well
    for name, shape in other.items():
        if name.endswith(".weight") and (not name.startswith(_LOOKED_UP) or (tied and name.startswith("token_embd."))):
            yield shape


def _fits(shape: Sequence[Any]) -> bool:
    return len(shape) > 2 and int(shape[2]) % _ROWS == 0 and int(shape[2]) > 1


def size_of(shape: Sequence[Any]) -> int:
    """Bytes of a tensor of this type and these dimensions."""
    rows = 1
    for count in shape[2:]:
        rows *= int(count)
    return row_bytes(_KINDS[shape[0]], int(shape[1])) * rows
