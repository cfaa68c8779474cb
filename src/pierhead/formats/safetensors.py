"""The header of a safetensors file: which tensors there are, of which type and where; the weights are never read.

Source: the format's own description. The header is a length (8 bytes, little-endian) and a JSON object; tensors cover
the rest of the file without gaps, which is checked.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from pierhead.formats.reading import Ask, File, Reading, exactly, json_object, unusable

KIND = "safetensors"
MAX_HEADER = 16 << 20
MAX_TENSORS = 1 << 17
MAX_DIMS = 8
MAX_NAME = 512
_INT63 = 1 << 63

# Bits of one element.
DTYPES: dict[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class Tensor(NamedTuple):
    """One tensor; ``begin`` and ``end`` count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What one file says about itself; ``data_offset`` is where the first tensor starts."""

    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]
    data_offset: int


def glance(beginning: bytes, size: int | None) -> None:
    """CorruptData where the first bytes of a file cannot be such a header."""
    if len(beginning) < 9:
        unusable(KIND, f"it has only {len(beginning)} bytes")
    (length,) = struct.unpack_from("<Q", beginning)
    if not 2 <= length <= MAX_HEADER:
        unusable(KIND, f"its header claims {length} bytes (2 to {MAX_HEADER} are accepted)")
    if size is not None and 8 + length > size:
        unusable(KIND, f"its header claims {length} bytes, the whole file has {size}")
    if beginning[8:9] != b"{":
        unusable(KIND, "its header does not begin like one")


def read_header(file: File, start: int = 0) -> Reading[Header]:
    """Header of a file, or of a member that lies at ``start`` in it (``file.size`` is the member's own size)."""
    beginning = yield Ask(file.name, start, 64 << 10)
    glance(beginning, file.size)
    (length,) = struct.unpack_from("<Q", beginning)
    raw = beginning[8 : 8 + length]
    if len(raw) < length:
        raw += yield from exactly(KIND, file, start + 8 + len(raw), length - len(raw))
    return parse(raw, file.size)


def parse(raw: bytes, size: int | None) -> Header:
    """The header's JSON; ``size`` is the whole file's, if known."""
    found = json_object(KIND, raw)
    about = found.pop("__metadata__", None)
    if len(found) > MAX_TENSORS:
        unusable(KIND, f"it has {len(found)} tensors (at most {MAX_TENSORS} are accepted)")
    tensors = sorted((_tensor(name, entry) for name, entry in found.items()), key=lambda t: (t.begin, t.end))
    end, before = 0, ""
    for tensor in tensors:
        if tensor.begin < end:
            unusable(KIND, f"tensors {before!r} and {tensor.name!r} overlap")
        if tensor.begin > end:
            unusable(KIND, f"there is a gap before tensor {tensor.name!r}")
        end, before = tensor.end, tensor.name
    if size is not None and 8 + len(raw) + end != size:
        unusable(KIND, f"its tensors end at byte {8 + len(raw) + end}, the file has {size}")
    return Header(tuple(tensors), _metadata(about), 8 + len(raw))


def _tensor(name: str, entry: Any) -> Tensor:
    if len(name) > MAX_NAME or not isinstance(entry, dict):
        unusable(KIND, f"{name[:80]!r} is no tensor")
    given = cast("dict[str, Any]", entry)
    dtype, shape, offsets = given.get("dtype"), given.get("shape"), given.get("data_offsets")
    bits = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        unusable(KIND, f"tensor {name!r} has the unknown type {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(cast("list[int]", shape)) > MAX_DIMS:
        unusable(KIND, f"tensor {name!r} has an impossible shape {str(shape)[:80]}")
    if not _naturals(offsets) or len(cast("list[int]", offsets)) != 2:
        unusable(KIND, f"tensor {name!r} has an impossible place {str(offsets)[:80]}")
    elements = 1
    for extent in cast("list[int]", shape):
        elements *= extent
        if elements >= _INT63:
            unusable(KIND, f"tensor {name!r} has an impossible shape {str(shape)[:80]}")
    begin, end = cast("list[int]", offsets)
    if elements * bits % 8 or end - begin != elements * bits // 8:
        unusable(KIND, f"tensor {name!r} of {elements} × {dtype} takes {end - begin} bytes")
    return Tensor(name, str(dtype), tuple(cast("list[int]", shape)), elements, begin, end)


def _naturals(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(type(item) is int and 0 <= item < _INT63 for item in cast("list[object]", value))


def _metadata(about: Any) -> dict[str, str]:
    if about is None:
        return {}
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in cast("dict[str, Any]", about).values()):
        unusable(KIND, "its metadata is not text")
    return cast("dict[str, str]", about)
