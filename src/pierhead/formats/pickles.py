"""What a pickle would do when it is loaded, read from its instructions; nothing is ever unpickled.

A pickle is a program. Only functions and classes of a short list may be named in it: those that rebuild tensors, arrays
and plain containers. Anything else, and whatever cannot be followed, counts as code of the file's author. The list
follows the one of PyTorch's own ``weights_only`` loader.
"""

from __future__ import annotations

import pickletools
import re
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from pierhead.formats.findings import short

MAX_STEPS = 2_000_000
MAX_SECONDS = 20.0
MAX_ARGUMENT = 1 << 20  # bytes of one string or integer that are looked at; longer ones are stepped over
MAX_PICKLES = 16  # that follow each other in one file
MAX_NAMES = 20
WORKED_OUT = "a name that is worked out while loading"
TORCH_MAGIC = 0x1950A86A20F9469CFC6C

_PLAIN = {
    "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple "
    "xrange long unicode",
    "collections": "OrderedDict defaultdict Counter deque",
    "_codecs": "encode",
    "copyreg": "_reconstructor",
    "fractions": "Fraction",
    "decimal": "Decimal",
    "datetime": "date datetime time timedelta timezone",
    "pathlib": "Path PosixPath PurePosixPath PurePath WindowsPath PureWindowsPath",
    "uuid": "UUID",
    "numpy": "dtype ndarray bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 "
    "complex64 complex128 str_ bytes_",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "torch": "Size Tensor device dtype finfo iinfo Generator strided sparse_coo per_tensor_affine per_channel_affine "
    "preserve_format contiguous_format channels_last float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 "
    "uint16 uint32 uint64 bool complex64 complex128 float8_e4m3fn float8_e5m2 quint8 qint8 qint32 FloatStorage "
    "DoubleStorage HalfStorage BFloat16Storage LongStorage IntStorage ShortStorage CharStorage ByteStorage BoolStorage "
    "ComplexFloatStorage ComplexDoubleStorage QInt8Storage QInt32Storage QUInt8Storage FloatTensor DoubleTensor "
    "HalfTensor BFloat16Tensor LongTensor IntTensor ShortTensor CharTensor ByteTensor BoolTensor",
    "torch._utils": "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter "
    "_rebuild_parameter_with_state _rebuild_qtensor _rebuild_sparse_tensor _rebuild_meta_tensor_no_storage "
    "_rebuild_nested_tensor _rebuild_device_tensor_from_numpy _rebuild_device_tensor_from_cpu_tensor",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch.nn.parameter": "Parameter UninitializedParameter Buffer",
    "torch.storage": "TypedStorage UntypedStorage",
    "torch.serialization": "_get_layout",
    "torch.jit._pickle": "build_intlist build_doublelist build_boollist build_tensorlist build_tensor_from_id "
    "restore_type_tag",
}
_OLD = {"__builtin__": "builtins", "copy_reg": "copyreg"}
SAFE = frozenset(f"{module} {name}" for module, names in _PLAIN.items() for name in names.split())

_STRINGS = frozenset(
    {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
)
_MARK = object()


class _Long(bytes):
    """Stands for bytes that were stepped over."""

    length = 0

    def __len__(self) -> int:
        return self.length


class _Window:
    """The file as ``pickletools`` reads it; arguments too long to matter are stepped over, not read."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file = file
        self._end = end

    def read(self, count: int) -> bytes:
        if count <= MAX_ARGUMENT:
            return self._file.read(count)
        here = self._file.tell()
        made = _Long()
        made.length = max(0, min(count, self._end - here))
        self._file.seek(here + made.length)
        return made

    def readline(self) -> bytes:
        line = self._file.readline(MAX_ARGUMENT)
        if len(line) < MAX_ARGUMENT or line.endswith(b"\n"):
            return line
        while (more := self._file.readline(MAX_ARGUMENT)) and not more.endswith(b"\n"):
            pass
        if not more:
            return line
        quote = line[:1] if line[:1] in (b"'", b'"') else b""
        return (quote * 2 or re.sub(rb"[^0-9A-Za-z_. ]", b"", line[:64])) + b"\n"

    def tell(self) -> int:
        return self._file.tell()


class Program:
    """One pickle, followed step by step: ``names`` it imports that are not on the list, ``whole`` when it ends well.

    ``first`` is its value where that is a number (older PyTorch files begin with one).
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.whole = False
        self.trouble = ""
        self.steps = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.first: Any = None

    def follow(self, steps: Iterator[tuple[Any, Any, Any]], until: float) -> None:
        """Run through the instructions; what breaks off has been looked at up to there."""
        try:
            for opcode, argument, _ in steps:
                self.steps += 1
                if self.steps > MAX_STEPS or (self.steps % 4096 == 0 and time.monotonic() > until):
                    self.trouble = "it is too long to be looked through"
                    return
                self._step(opcode, argument)
                if opcode.name == "STOP":
                    self.whole = True
        except (ValueError, IndexError, KeyError, UnicodeError, OverflowError, MemoryError) as exc:
            self.trouble = short(str(exc)) or type(exc).__name__

    def _step(self, opcode: Any, argument: Any) -> None:
        name: str = opcode.name
        if name == "GLOBAL":
            module, _, attribute = str(argument).partition(" ")
            self._import(module, attribute)
        elif name == "INST":
            module, _, attribute = str(argument).partition(" ")
            self._to_mark()
            self._import(module, attribute)
        elif name == "STACK_GLOBAL":
            attribute, module = self._stack.pop(), self._stack.pop()
            self._import(module, attribute)
        elif name.startswith("EXT"):
            self._note(f"extension {argument}")
            self._stack.append(None)
        elif not self._move(name, argument):
            self._generic(opcode, argument)

    def _move(self, name: str, argument: Any) -> bool:
        """Instructions that only move values about; whether it was one."""
        stack = self._stack
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[int(argument)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "STOP":
            self.first = stack[-1] if stack else None
        else:
            return False
        return True

    def _generic(self, opcode: Any, argument: Any) -> None:
        """Any other instruction takes values and leaves some, of which only strings and numbers are remembered."""
        before = [x.name for x in opcode.stack_before]
        if "mark" in before:
            self._to_mark()
            before = before[: before.index("mark")]
        for _ in before:
            if self._stack.pop() is _MARK:
                raise ValueError("it takes more values than there are")
        kept = argument if opcode.name in _STRINGS or isinstance(argument, int) else None
        self._stack += [kept] * len(opcode.stack_after)

    def _to_mark(self) -> None:
        while self._stack.pop() is not _MARK:
            pass

    def _import(self, module: Any, attribute: Any) -> None:
        self._stack.append(None)
        if not isinstance(module, str) or not isinstance(attribute, str):
            self._note(WORKED_OUT)
            return
        module = _OLD.get(module, module)
        if f"{module} {attribute}" not in SAFE and not module.startswith("__torch__."):  # classes of TorchScript
            self._note(f"{module}.{attribute}")

    def _note(self, name: str) -> None:
        name = short(name, 80)
        if name not in self.names and len(self.names) < MAX_NAMES:
            self.names.append(name)


def _plausible(name: str, whole: bool) -> bool:
    """Whether bytes that may be no pickle at all name code: raw numbers can look like an instruction or two."""
    if name == WORKED_OUT:
        return whole
    return "." in name and all(part.isidentifier() and part.isascii() for part in name.split("."))


def scan(file: BinaryIO, size: int, *, certain: bool) -> list[str]:
    """Why the pickles at the file's position should not be loaded; empty when they should be.

    ``certain``: it is a pickle for sure, so what cannot be followed to its end is a reason, too. Without, such bytes
    may be something else, and only what was seen in them counts.
    """
    until = time.monotonic() + MAX_SECONDS
    end = file.tell() + size
    found: list[str] = []
    expected = 1
    for number in range(MAX_PICKLES):
        start = file.tell()
        beginning = file.read(1)
        file.seek(start)
        if not beginning:
            break
        sure = certain and (number < expected or beginning == b"\x80")
        program = Program()
        program.follow(pickletools.genops(_Window(file, end)), until)  # pyright: ignore[reportArgumentType]
        found += [n for n in program.names if n not in found and (sure or _plausible(n, program.whole))]
        if number == 0 and program.first == TORCH_MAGIC:
            expected = 5  # older PyTorch: a number, a version, the system, the object and its storages
        if not program.whole:
            if number < expected and (certain or program.trouble.startswith("it is too long")):
                found.append(f"it cannot be followed to its end ({program.trouble})")
            break
    return found
