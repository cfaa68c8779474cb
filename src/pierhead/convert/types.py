"""The types that llama.cpp's quantizer makes and every llama.cpp reads; pure."""

from __future__ import annotations

from pierhead.errors import UsageError

# Name → (about how many bits a weight has, whether it is of no use without an importance matrix).
TYPES: dict[str, tuple[float, bool]] = {
    "F32": (32.0, False),
    "F16": (16.0, False),
    "BF16": (16.0, False),
    "Q8_0": (8.5, False),
    "Q6_K": (6.6, False),
    "Q5_K_M": (5.7, False),
    "Q5_K_S": (5.5, False),
    "Q5_1": (6.0, False),
    "Q5_0": (5.5, False),
    "Q4_K_M": (4.9, False),
    "Q4_K_S": (4.6, False),
    "Q4_1": (5.0, False),
    "Q4_0": (4.5, False),
    "IQ4_NL": (4.5, False),
    "IQ4_XS": (4.3, False),
    "Q3_K_L": (4.3, False),
    "Q3_K_M": (3.9, False),
    "Q3_K_S": (3.5, False),
    "IQ3_M": (3.7, False),
    "IQ3_S": (3.4, False),
    "IQ3_XS": (3.3, False),
    "IQ3_XXS": (3.1, True),
    "Q2_K": (3.0, False),
    "Q2_K_S": (2.8, True),
    "IQ2_M": (2.7, True),
    "IQ2_S": (2.5, True),
    "IQ2_XS": (2.3, True),
    "IQ2_XXS": (2.1, True),
    "IQ1_M": (1.8, True),
    "IQ1_S": (1.6, True),
}
WHOLE = frozenset({"F32", "F16", "BF16"})


def known(name: str, *, matrix: bool) -> str:
    """A type's name; UsageError for one that is none, or that needs an importance matrix."""
    found = TYPES.get(name.upper())
    if found is None:
        import difflib

        close = difflib.get_close_matches(name.upper(), TYPES, 1)
        hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(TYPES)}."
        raise UsageError(f"'{name[:40]}' is not a type of GGUF weights", hint=hint)
    if found[1] and not matrix:
        hint = "Give --imatrix FILE, as llama.cpp's llama-imatrix makes them, or take Q3_K_M or larger."
        raise UsageError(f"{name.upper()} is of no use without an importance matrix", hint=hint)
    return name.upper()
