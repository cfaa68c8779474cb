"""The GGUF header as a sans-I/O parser: bytes go in, a ``Header`` comes out; it never reads a file itself.

Outside input is not trusted: every count, length and size is checked against a bound before anything is built from it,
and the contents of large arrays (vocabulary, merges, scores) are stepped over without making Python objects.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from pierhead.errors import CorruptData
from pierhead.formats.ggml import REMOVED_TYPES, TENSOR_TYPES, TensorType

Value = int | float | bool | str | tuple[int | float | bool | str, ...]
"""A metadata value; arrays longer than ``KEEP_ARRAY`` are only counted."""

MAX_HEADER = 64 << 20
MAX_KEYS = 16_384
MAX_TENSORS = 65_536
MAX_KEY = 512
MAX_STRING = 2 << 20
MAX_TENSOR_NAME = 256
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4
KEEP_ARRAY = 1024
KEEP_ARRAY_STRING = 1024
MAX_KEPT = 8 << 20
_INT64 = 1 << 63

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

Need = Generator[int, None, None]


class Tensor(NamedTuple):
    """One tensor: ``shape`` in ggml order (fastest first), ``offset`` from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself; ``arrays`` holds the lengths of all arrays, kept or not.

    ``size`` is the size of the whole file in bytes where it was known, ``data_offset`` where tensor data starts.
    """

    version: int
    metadata: Mapping[str, Value]
    arrays: Mapping[str, int]
    tensors: tuple[Tensor, ...]
    alignment: int
    data_offset: int
    size: int | None
    shards: int = 1


def corrupt(message: str, hint: str | None = None) -> NoReturn:
    """Refuse the file: ``message`` continues the words "not a usable GGUF file: "."""
    raise CorruptData(f"not a usable GGUF file: {message}", hint=hint or "Download the file again, or ask its author.")


class HeaderParser:
    """Feed bytes until ``header`` is set: ``need`` is the total number of bytes the next step wants.

    ``size`` is the size of the whole file, if known: then counts and tensor data are checked against it.
    """

    def __init__(self, size: int | None = None) -> None:
        self._buffer = bytearray()  # what is not parsed yet …
        self._base = 0  # … and where in the file it starts
        self._at = 0  # the next byte, within the buffer
        self._size = size
        self._kept = 0
        self._alignment = 32
        self._metadata: dict[str, Value] = {}
        self._arrays: dict[str, int] = {}
        self.header: Header | None = None
        self._run = self._parse()
        self.need = next(self._run)

    @property
    def received(self) -> int:
        """How many bytes were fed."""
        return self._base + len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the file and go on as far as they reach; ``CorruptData`` when they make no sense."""
        self._buffer += data
        if self.header is not None or self.received < self.need:
            return
        try:
            self.need = next(self._run)
        except StopIteration:
            self._buffer = bytearray()
            return
        if self._size is not None and self.need > self._size:
            corrupt(f"it ends inside its header ({self._size} bytes, at least {self.need} expected)")
        if self.need > MAX_HEADER:
            corrupt(f"its header is longer than {MAX_HEADER >> 20} MiB")
        done = min(self._at, len(self._buffer))  # a long string may reach beyond what is here
        del self._buffer[:done]
        self._base, self._at = self._base + done, self._at - done

    # -- primitives: each makes sure that its bytes are there, then moves on ---------------------------------------

    def _want(self, count: int) -> Need:
        while self._at + count > len(self._buffer):
            yield self._base + self._at + count

    def _unpack(self, layout: struct.Struct) -> Generator[int, None, int | float | bool]:
        yield from self._want(layout.size)
        (value,) = layout.unpack_from(self._buffer, self._at)
        self._at += layout.size
        return value

    def _int(self, layout: struct.Struct) -> Generator[int, None, int]:
        return int((yield from self._unpack(layout)))

    def _text(self, limit: int, what: str) -> Generator[int, None, str]:
        length = yield from self._int(_U64)
        if length > limit:
            corrupt(f"{what} claims {length} bytes (at most {limit} are accepted)")
        yield from self._want(length)
        raw = bytes(self._buffer[self._at : self._at + length])
        self._at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            corrupt(f"{what} is not UTF-8")

    # -- the parts of the header, in their order -------------------------------------------------------------------

    def _parse(self) -> Need:
        version = yield from self._version()
        tensor_count = yield from self._int(_U64)
        key_count = yield from self._int(_U64)
        self._check_counts(tensor_count, key_count)
        for _ in range(key_count):
            yield from self._entry()
        tensors: list[Tensor] = []
        names: set[str] = set()
        for _ in range(tensor_count):
            tensor = yield from self._tensor()
            if tensor.name in names:
                corrupt(f"tensor {tensor.name!r} appears twice")
            names.add(tensor.name)
            tensors.append(tensor)
        data_offset = -(-(self._base + self._at) // self._alignment) * self._alignment
        self._check_layout(tensors, data_offset)
        self.header = Header(
            version, self._metadata, self._arrays, tuple(tensors), self._alignment, data_offset, self._size
        )

    def _version(self) -> Generator[int, None, int]:
        yield from self._want(4)
        magic = bytes(self._buffer[:4])
        if magic != b"GGUF":
            corrupt(f"it starts with {magic!r}, not with b'GGUF'", "check that the reference names a .gguf file")
        self._at = 4
        version = yield from self._int(_U32)
        if version & 0xFFFF == 0 and version:
            corrupt("it is big-endian (made for s390x or POWER)", "look for the little-endian file of this model")
        if version not in (2, 3):
            corrupt(
                f"version {version} is not supported (2 and 3 are)", "convert it with llama.cpp's convert_hf_to_gguf.py"
            )
        return version

    def _check_counts(self, tensors: int, keys: int) -> None:
        if keys > MAX_KEYS:
            corrupt(f"it claims {keys} metadata keys (at most {MAX_KEYS} are accepted)")
        if tensors > MAX_TENSORS:
            corrupt(f"it claims {tensors} tensors (at most {MAX_TENSORS} are accepted)")
        least = 24 + keys * 13 + tensors * 32
        if self._size is not None and least > self._size:
            corrupt(f"it claims {keys} keys and {tensors} tensors, more than its {self._size} bytes can hold")

    def _entry(self) -> Need:
        key = yield from self._text(MAX_KEY, "a metadata key")
        if not key:
            corrupt("a metadata key is empty")
        if key in self._metadata or key in self._arrays:
            corrupt(f"metadata key {key!r} appears twice")
        kind = yield from self._int(_U32)
        if kind == _ARRAY:
            yield from self._array(key)
        else:
            self._metadata[key] = yield from self._value(key, kind, MAX_STRING)
        if key == "general.alignment":
            self._set_alignment()

    def _value(self, key: str, kind: int, limit: int) -> Generator[int, None, int | float | bool | str]:
        if kind == _STRING:
            text = yield from self._text(limit, f"metadata {key!r}")
            self._keep(len(text))
            return text
        self._keep(0)
        layout = _SCALARS.get(kind)
        if layout is None:
            corrupt(f"metadata {key!r} has the unknown type {kind}")
        return (yield from self._unpack(layout))

    def _keep(self, size: int) -> None:
        """Account for memory that metadata takes; 64 is about what any Python object costs."""
        self._kept += 64 + size
        if self._kept > MAX_KEPT:
            corrupt(f"its metadata would take more than {MAX_KEPT >> 20} MiB")

    def _array(self, key: str) -> Need:
        kind = yield from self._int(_U32)
        count = yield from self._int(_U64)
        self._arrays[key] = count
        if kind == _ARRAY:
            corrupt(f"metadata {key!r} is an array of arrays")
        if kind != _STRING and kind not in _SCALARS:
            corrupt(f"metadata {key!r} is an array of the unknown type {kind}")
        least = count * (8 if kind == _STRING else _SCALARS[kind].size)
        if least > MAX_HEADER or (self._size is not None and self._base + self._at + least > self._size):
            corrupt(f"metadata {key!r} claims {count} elements, more than the file can hold")
        if count > KEEP_ARRAY or key.startswith("tokenizer."):
            yield from (self._skip_strings(key, count) if kind == _STRING else self._skip(least))
            return
        values: list[int | float | bool | str] = []
        for _ in range(count):
            values.append((yield from self._value(key, kind, KEEP_ARRAY_STRING)))
        self._metadata[key] = tuple(values)

    def _skip(self, count: int) -> Need:
        while count:
            yield from self._want(1)
            step = min(count, len(self._buffer) - self._at)
            self._at += step
            count -= step

    def _skip_strings(self, key: str, count: int) -> Need:
        """Step over ``count`` strings; the hot loop of the reader, so it works on local names only."""
        unpack = _U64.unpack_from
        while count:
            buffer, at = self._buffer, self._at
            last = len(buffer) - 8
            length = 0
            while count and at <= last:
                length = unpack(buffer, at)[0]
                if length > MAX_STRING:
                    corrupt(f"a string of metadata {key!r} claims {length} bytes (at most {MAX_STRING} are accepted)")
                at += 8 + length
                count -= 1
            self._at = at
            yield from self._want(8 if count else 0)

    def _set_alignment(self) -> None:
        value = self._metadata.get("general.alignment")
        if not isinstance(value, int) or value < 1 or value > MAX_ALIGNMENT or value & (value - 1):
            corrupt(f"its alignment is {value!r}, not a power of two up to {MAX_ALIGNMENT}")
        self._alignment = value

    def _tensor(self) -> Generator[int, None, Tensor]:
        name = yield from self._text(MAX_TENSOR_NAME, "a tensor name")
        rank = yield from self._int(_U32)
        if not 1 <= rank <= MAX_DIMS:
            corrupt(f"tensor {name!r} has {rank} dimensions (1 to {MAX_DIMS} are accepted)")
        shape: list[int] = []
        elements = 1
        for _ in range(rank):
            extent = yield from self._int(_U64)
            elements *= extent
            if extent < 1 or elements >= _INT64:
                corrupt(f"tensor {name!r} has an impossible shape {[*shape, extent]}")
            shape.append(extent)
        number = yield from self._int(_U32)
        offset = yield from self._int(_U64)
        kind = TENSOR_TYPES.get(number)
        if number in REMOVED_TYPES:
            corrupt(f"tensor {name!r} has type {number}, which llama.cpp removed", "look for its Q4_0 file")
        if kind is None:
            corrupt(f"tensor {name!r} has the unknown type {number}", "a newer Pierhead may know it: update")
        if shape[0] % kind.block:
            corrupt(f"tensor {name!r}: rows of {shape[0]} do not divide into {kind.name} blocks of {kind.block}")
        if offset % self._alignment:
            corrupt(f"tensor {name!r} starts at {offset}, not at a multiple of {self._alignment}")
        return Tensor(name, tuple(shape), kind, offset, elements, elements // kind.block * kind.size)

    def _check_layout(self, tensors: Sequence[Tensor], data_offset: int) -> None:
        """Tensors may not overlap, and their data must lie inside the file."""
        end, before = 0, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                corrupt(f"tensors {before!r} and {tensor.name!r} overlap")
            end, before = tensor.offset + tensor.nbytes, tensor.name
        if self._size is not None and tensors and data_offset + end > self._size:
            corrupt(f"tensor {before!r} ends at byte {data_offset + end}, but the file has only {self._size}")
