"""Pickles are followed without being run: what names code is found, however it is hidden, and plain data passes."""

from __future__ import annotations

import collections
import datetime
import io
import os
import pickle
import struct
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pierhead.formats import pickles

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:invalid escape sequence")]


class Runs:
    """What an attacker's object says when it is pickled."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.how = (call, args)

    def __reduce__(self) -> Any:
        return self.how


def reasons(data: bytes, *, certain: bool = True) -> list[str]:
    return pickles.scan(io.BytesIO(data), len(data), certain=certain)


PLAIN = [
    {"weight": [1, 2.5, None, True], "names": ("a", b"b", {1, 2}, frozenset("x"))},
    collections.OrderedDict(a=collections.Counter("abc")),
    datetime.datetime(2026, 1, 1),
    [bytearray(b"x"), 2**80, range(3), complex(1, 2)],
    "x" * 3_000_000,
    b"x" * 3_000_000,
]


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("value", PLAIN, ids=lambda v: type(v).__name__)
def test_plain_data_passes(value: Any, protocol: int) -> None:
    assert reasons(pickle.dumps(value, protocol)) == []


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("call", [os.system, eval, exec, __import__, getattr, open, pickle.loads])
def test_code_is_named(call: Any, protocol: int) -> None:
    found = reasons(pickle.dumps({"a": [Runs(call, "x")]}, protocol))
    assert any(name.endswith(f".{call.__name__}") for name in found)


HIDDEN = {
    "by a global": b"cos\nsystem\n(S'id'\ntR.",
    "by an instance": b"(S'id'\nios\nsystem\n.",
    "behind plain data": pickle.dumps([1, 2]) + b"cos\nsystem\n(S'id'\ntR.",
    "in a second pickle": pickle.dumps([1, 2]) + pickle.dumps(Runs(os.system, "id")),
    "without an end": b"\x80\x04cos\nsystem\n(S'id'\ntR",
    "before damage": b"\x80\x04cos\nsystem\n(S'id'\ntR\xff\xff",
    "after damage that loaders pass": b"\x80\x04\xff\xffcos\nsystem\n(S'id'\ntR.",
    "through the memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x02id\x85R.",
    "by a name that is put together": b"\x80\x04]\x8c\x02osa\x8c\x06system\x93.",
    "by an extension": b"\x80\x02\x82\x01.",
    "with a dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
    "under the old name": b"c__builtin__\neval\n(S'1'\ntR.",
    "with a mark for a name": b"\x80\x04((\x93.",
    "after a very long text": b"\x80\x04X" + struct.pack("<I", 5_000_000) + b"x" * 5_000_000 + b"0cos\nsystem\n.",
    "with spaces in its module": b"\x80\x02cos \nsystem\n.",
}


@pytest.mark.parametrize("data", HIDDEN.values(), ids=HIDDEN.keys())
def test_code_is_found_however_it_is_hidden(data: bytes) -> None:
    assert reasons(data) != []


def test_an_older_torch_file_is_followed_through_its_five_pickles() -> None:
    parts: list[Any] = [pickles.TORCH_MAGIC, 1001, {"little_endian": True}, {"w": 1}, ["0"]]
    good = b"".join(pickle.dumps(p, 2) for p in parts) + b"\x80raw numbers follow"
    assert reasons(good) == []
    parts[3] = Runs(os.system, "id")
    assert reasons(b"".join(pickle.dumps(p, 2) for p in parts)) == [f"{os.system.__module__}.system"]
    assert reasons(b"".join(pickle.dumps(p, 2) for p in parts[:3]) + b"\x80\x02X") != []


def test_raw_numbers_are_not_taken_for_a_pickle() -> None:
    for seed in range(200):
        data = bytes((seed * 7 + i * 31) % 256 for i in range(64))
        assert reasons(data, certain=False) == []


def test_a_pickle_of_endless_steps_ends_in_time() -> None:
    data = b"\x80\x04" + b"N0" * (pickles.MAX_STEPS // 2 + 10) + b"."
    began = time.monotonic()
    assert "too long" in reasons(data)[0]
    assert time.monotonic() - began < pickles.MAX_SECONDS + 5


def test_sizes_that_lie_take_no_memory() -> None:
    for head in (
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f",
        b"\x80\x02\x8b\xff\xff\xff\x7f",
    ):
        assert reasons(head + b"x." * 5) != []


# --- against the real machine -----------------------------------------------------------------------------------------


class _Inert:
    """Stands for whatever a pickle imports; takes every call and state."""

    def __new__(cls, *args: Any, **more: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **more: Any) -> None: ...

    def __call__(self, *args: Any, **more: Any) -> Any:
        return _Inert()

    def __setstate__(self, state: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


def imported(data: bytes, machine: Any) -> set[str]:
    """What the interpreter's own machine imports, with nothing behind the names."""
    names: set[str] = set()

    class Watching(machine):
        def find_class(self, module: str, name: str) -> Any:
            names.add(f"{module} {name}")
            return _Inert

        def persistent_load(self, pid: Any) -> Any:
            return None

    try:
        Watching(io.BytesIO(data)).load()
    except Exception:  # whatever a broken pickle raises: what it imported until then counts
        return names
    return names


def seeds() -> list[bytes]:
    values: list[Any] = [Runs(os.system, "id"), [Runs(eval, "1")] * 2, {"a": (1, "b")}, collections.OrderedDict(a=1)]
    return [pickle.dumps(v, p) for v in values for p in range(6)] + list(HIDDEN.values())[:8]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(seeds())))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.integers(0, 2)):
            case 0:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at : at + draw(st.integers(1, 4))]
            case _:
                data[at:at] = draw(st.binary(max_size=4))
        if not data:
            return b"."
    return bytes(data)


@given(mutated())
@example(b"\x80\x04cos\nsystem\n.")
def test_whatever_the_real_machine_would_import_was_seen(data: bytes) -> None:
    found = reasons(data)
    for machine in (pickle.Unpickler, pickle._Unpickler):
        for name in imported(data, machine):
            module, _, attribute = name.partition(" ")
            known = f"{pickles._OLD.get(module, module)} {attribute}" in pickles.SAFE
            assert known or found, (data, name)


@given(st.binary(max_size=200))
def test_any_bytes_are_answered(data: bytes) -> None:
    reasons(data, certain=True)
    reasons(data, certain=False)
