"""What an ONNX file says about itself: inputs, outputs, operators and weights; nothing is executed, no weight is read.

The protobuf is walked by hand: the `onnx` library reads the whole file into memory, and needs it here to begin with.
This walk steps over embedded weights, so that it works by range requests, and every count is bounded. Source of the
field numbers: onnx.proto (ModelProto, GraphProto, TensorProto, ValueInfoProto).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pierhead.formats.reading import Ask, File, Reading, unusable

KIND = "ONNX"
MAX_READ = 64 << 20
MAX_TENSORS = 1 << 16
MAX_NODES = 1 << 20
MAX_VALUES = 1024  # inputs and outputs
MAX_SMALL = 64 << 10  # bytes of a message that is read whole
FIRST_WINDOW = 32 << 10
MAX_WINDOW = 1 << 20
_INT63 = 1 << 63

# enum TensorProto.DataType: name and bits of one element.
TYPES: dict[int, tuple[str, int]] = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    8: ("string", 0),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    **{17 + n: (f"float8_{name}", 8) for n, name in enumerate(("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"))},
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4_e2m1", 4),
    24: ("float8_e8m0", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
}


@dataclass
class Model:
    """``inputs`` and ``outputs`` are ``{"name", "type", "shape"}``; a name in a shape is a free dimension.

    ``elements`` and ``nbytes`` are by type; ``external`` are the files beside this one that hold weights.
    """

    ir_version: int = 0
    producer: str = ""
    opset: dict[str, int] = field(default_factory=dict[str, int])
    inputs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    outputs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    nodes: int = 0
    tensors: int = 0
    elements: dict[str, int] = field(default_factory=dict[str, int])
    nbytes: dict[str, int] = field(default_factory=dict[str, int])
    initializers: set[str] = field(default_factory=set[str])
    external: set[str] = field(default_factory=set[str])


class _Field(NamedTuple):
    """One field: a number for wire type 0, else ``at`` and ``length`` of its bytes."""

    number: int
    value: int
    at: int
    length: int
    wire: int


class _Window:
    """A part of the file in memory that moves on; grows while reading goes straight on."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.start = 0
        self.data = b""
        self.total = 0
        self.step = FIRST_WINDOW

    def bytes(self, at: int, length: int, *, short: bool = False) -> Reading[bytes]:
        """``length`` bytes at ``at``; with ``short`` fewer at the end of the file."""
        if not (self.start <= at and at + length <= self.start + len(self.data)):
            straight = self.start <= at <= self.start + len(self.data) + FIRST_WINDOW
            self.step = min(self.step * 2, MAX_WINDOW) if straight else FIRST_WINDOW
            yield from self._load(at, max(length, self.step))
        found = self.data[at - self.start : at - self.start + length]
        if len(found) < length and not short:
            unusable(KIND, f"it ends inside a field at byte {at}")
        return found

    def _load(self, at: int, length: int) -> Reading[None]:
        if self.file.size is not None:
            length = min(length, max(0, self.file.size - at))
        self.start, self.data = at, b""
        while len(self.data) < length:
            self.total += length - len(self.data)
            if self.total > MAX_READ:
                unusable(KIND, f"its structure is larger than {MAX_READ >> 20} MiB")
            more = yield Ask(self.file.name, at + len(self.data), length - len(self.data))
            if not more:
                return
            self.data += more


def glance(beginning: bytes) -> None:
    """CorruptData where the first bytes of a file cannot be a model's."""
    if len(beginning) < 4 or beginning[0] != 0x08:  # field 1, the IR's version, comes first in every writer's output
        unusable(KIND, f"it starts with {beginning[:4]!r}")


def read_model(file: File) -> Reading[Model]:
    """Walk a model; CorruptData where it is none, or is beyond all bounds."""
    window = _Window(file)
    model = Model()
    end = file.size if file.size is not None else _INT63
    graphs = 0
    at = 0
    while at < end:
        if file.size is None and not (yield from window.bytes(at, 1, short=True)):
            break
        found, at = yield from _next(window, at, end)
        if found.number == 7 and found.wire == 2:
            graphs += 1
            yield from _graph(window, found, model)
        else:
            yield from _about(window, found, model)
    if graphs != 1 or not model.ir_version:
        unusable(KIND, "it holds no graph" if not graphs else "it holds several graphs or no version")
    model.inputs = [one for one in model.inputs if one["name"] not in model.initializers]
    return model


def _about(window: _Window, found: _Field, model: Model) -> Reading[None]:
    if found.number == 1 and found.wire == 0:
        model.ir_version = found.value
    elif found.number == 2 and found.wire == 2:
        model.producer = _text((yield from _small(window, found)))[:200]
    elif found.number == 8 and found.wire == 2:
        parts = dict[int, Any](_parts((yield from _small(window, found))))
        if len(model.opset) < MAX_VALUES:
            model.opset[_text(parts.get(1, b""))[:200]] = _number(parts.get(2, 0))


def _graph(window: _Window, graph: _Field, model: Model) -> Reading[None]:
    at, end = graph.at, graph.at + graph.length
    while at < end:
        found, at = yield from _next(window, at, end)
        if found.number == 1:
            model.nodes += 1
            if model.nodes > MAX_NODES:
                unusable(KIND, f"its graph has more than {MAX_NODES} nodes")
        elif found.number == 5 and found.wire == 2:
            yield from _tensor(window, found, model)
        elif found.number in (11, 12) and found.wire == 2:
            values = model.inputs if found.number == 11 else model.outputs
            if len(values) >= MAX_TENSORS or (found.number == 12 and len(values) >= MAX_VALUES):
                unusable(KIND, "its graph has too many inputs or outputs")
            values.append(_value((yield from _small(window, found))))


def _tensor(window: _Window, tensor: _Field, model: Model) -> Reading[None]:
    """An initializer: its dimensions and type; its data is stepped over."""
    model.tensors += 1
    if model.tensors > MAX_TENSORS:
        unusable(KIND, f"it has more than {MAX_TENSORS} tensors")
    shape: list[int] = []
    kind, name = 0, ""
    at, end = tensor.at, tensor.at + tensor.length
    while at < end:
        found, at = yield from _next(window, at, end)
        if found.number == 2 and found.wire == 0:
            kind = found.value
        elif found.number in (1, 8, 13):
            raw = (yield from _small(window, found)) if found.wire == 2 else b""
            if found.number == 1:
                shape += [found.value] if found.wire == 0 else _varints(raw)
            elif found.number == 8:
                name = _text(raw)
            else:
                entry = dict[int, Any](_parts(raw))
                model.external |= {_location(_text(entry.get(2, b"")))} if entry.get(1) == b"location" else set()
    _count(model, kind, name, shape)


def _count(model: Model, kind: int, name: str, shape: list[int]) -> None:
    elements = 1
    for extent in shape:
        elements *= extent
        if elements >= _INT63:
            unusable(KIND, f"tensor {name[:80]!r} has an impossible shape")
    if kind not in TYPES:
        unusable(KIND, f"tensor {name[:80]!r} has the unknown type {kind}")
    word, bits = TYPES[kind]
    model.initializers.add(name)
    model.elements[word] = model.elements.get(word, 0) + elements
    model.nbytes[word] = model.nbytes.get(word, 0) + (elements * bits + 7) // 8


def _location(path: str) -> str:
    """Where a tensor's data is: a file below the model's own folder."""
    parts = path.split("/")
    if not path or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path or len(path) > 1024:
        unusable(KIND, f"it keeps weights outside of its folder: {path[:80]!r}")
    return "/".join(part for part in parts if part not in ("", "."))


def _value(raw: bytes) -> dict[str, Any]:
    """A ValueInfoProto: name, type of elements and shape."""
    parts = dict[int, Any](_parts(raw))
    tensor = dict[int, Any](_parts(_bytes(dict[int, Any](_parts(_bytes(parts.get(2)))).get(1))))
    shape: list[int | str] = []
    for number, dim in _parts(_bytes(tensor.get(2))):
        if number == 1:
            one = dict[int, Any](_parts(_bytes(dim)))
            shape.append(_number(one[1]) if 1 in one else _text(one.get(2, b""))[:80] or "?")
    kind = TYPES.get(_number(tensor.get(1, 0)), ("", 0))[0]
    return {"name": _text(parts.get(1, b""))[:200], "type": kind, "shape": shape[:16]}


# --- the wire -----------------------------------------------------------------------------------------------------


def _next(window: _Window, at: int, end: int) -> Reading[tuple[_Field, int]]:
    """The field at ``at`` and where the next one is."""
    head = yield from window.bytes(at, min(20, end - at), short=True)
    tag, used = _varint(head, 0)
    number, wire = tag >> 3, tag & 7
    if not number:
        unusable(KIND, f"there is no field at byte {at}")
    if wire == 0:
        value, used = _varint(head, used)
        return _Field(number, value, 0, 0, 0), at + used
    length = {1: 8, 5: 4}.get(wire, -1)
    if wire == 2:
        length, used = _varint(head, used)
    if length < 0:
        unusable(KIND, f"byte {at} has a field of the unknown kind {wire}")
    place = at + used
    if place + length > end:
        unusable(KIND, f"a field at byte {at} claims {length} bytes, more than there are")
    return _Field(number, 0, place, length, wire), place + length


def _small(window: _Window, found: _Field) -> Reading[bytes]:
    if found.length > MAX_SMALL:
        unusable(KIND, f"a field at byte {found.at} has {found.length} bytes (at most {MAX_SMALL} are accepted)")
    return (yield from window.bytes(found.at, found.length))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            unusable(KIND, "a number has no end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _parts(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message that is in memory."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        length = {1: 8, 5: 4}.get(wire, -1)
        if wire == 2:
            length, at = _varint(data, at)
        if length < 0 or at + length > len(data):
            unusable(KIND, "a message is cut or of an unknown kind")
        yield tag >> 3, data[at : at + length]
        at += length


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b""


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _text(value: Any) -> str:
    return _bytes(value).decode("utf-8", "replace")
