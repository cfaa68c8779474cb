"""Whatever bytes come, the reader answers with a header or a PierError, and so does the estimate."""

from __future__ import annotations

import contextlib
import json
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pierhead.errors import PierError
from pierhead.formats import gguf
from pierhead.formats.estimate import estimate, fit_context
from pierhead.formats.gguf_parser import HeaderParser

from .conftest import LLAMA, PACK, STRING, Maker, TensorSpec, Typed, llama_tensors

QUICK = settings(max_examples=300, deadline=2000, suppress_health_check=list(HealthCheck))
BITS = (1, 8, 16, 31, 32, 33, 62, 63, 64)
INTERESTING = [0, 7, *((1 << bits) - 1 for bits in BITS), *(1 << bits for bits in BITS if bits < 64)]

mutation = st.tuples(
    st.sampled_from(["flip", "u32", "u64", "cut", "insert", "copy"]),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(INTERESTING),
    st.binary(min_size=1, max_size=16),
)


def mutate(data: bytes, changes: list[tuple[str, float, int, bytes]], reach: int) -> bytes:
    out = bytearray(data)
    for kind, where, number, raw in changes:
        at = int(where * min(len(out), reach))
        match kind:
            case "flip":
                out[at : at + len(raw)] = raw
            case "u32":
                out[at : at + 4] = struct.pack("<I", number & 0xFFFFFFFF)
            case "u64":
                out[at : at + 8] = struct.pack("<Q", number)
            case "cut":
                del out[at : at + len(raw)]
            case "insert":
                out[at:at] = raw
            case _:
                out[at:at] = out[: len(raw) * 8]
    return bytes(out)


def understand(data: bytes, size: int | None) -> None:
    """Everything a stranger's file goes through before it is stored."""
    try:
        parser = HeaderParser(size)
        for start in range(0, len(data), 1 << 20):
            parser.feed(data[start : start + (1 << 20)])
        if parser.header is None:
            return
        found = json.loads(json.dumps(gguf.summary(gguf.merge([parser.header])), allow_nan=False))
        whole = estimate(found, context=4096, parallel=2)
        assert whole.total >= whole.weights >= 0
        fit_context(found, free=1 << 30, limit=1 << 17)
    except PierError:
        return


@given(changes=st.lists(mutation, min_size=1, max_size=6), told=st.booleans())
@QUICK
def test_a_mutated_header_never_surprises(
    tiny: Callable[..., bytes], changes: list[tuple[str, float, int, bytes]], told: bool
) -> None:
    data = mutate(tiny(), changes, 1600)
    understand(data, len(data) if told else None)


@pytest.mark.model
@given(changes=st.lists(mutation, min_size=1, max_size=4), near=st.booleans())
@settings(QUICK, max_examples=80)
def test_a_mutated_real_header_never_surprises(
    real_header: bytes, changes: list[tuple[str, float, int, bytes]], near: bool
) -> None:
    understand(mutate(real_header, changes, 2000 if near else len(real_header)), None)


@given(data=st.binary(max_size=300))
@QUICK
def test_random_bytes_after_the_magic_never_surprise(data: bytes) -> None:
    understand(b"GGUF\x03\x00\x00\x00" + data, None)


scalar = st.one_of(
    st.builds(lambda kind, value: _typed(kind, value), st.sampled_from(sorted(PACK)), st.sampled_from(INTERESTING)),
    st.floats(width=32),
    st.text(max_size=20),
    st.lists(st.integers(0, 1 << 31), max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.lists(st.text(max_size=5), min_size=1, max_size=5),
)


def _typed(kind: int, value: int) -> Typed:
    code = PACK[kind]
    if code in "fd":
        return Typed(kind, float(value))
    if code == "?":
        return Typed(kind, bool(value))
    bits = struct.calcsize(code) * 8
    value &= (1 << bits) - 1
    return Typed(kind, value - (1 << bits) if code.islower() and value >> (bits - 1) else value)


OWN_KEYS = """
    attention.key_length attention.value_length attention.sliding_window attention.sliding_window_pattern
    attention.key_length_mla attention.value_length_mla attention.kv_lora_rank attention.shared_kv_layers
    ssm.conv_kernel ssm.inner_size ssm.state_size ssm.group_count wkv.head_size shortconv.l_cache
    rope.dimension_count nextn_predict_layers expert_count expert_used_count vocab_size
"""
GENERAL_KEYS = ["split.count", "split.no", "split.tensors.count", "general.alignment"]
KEYS = [*LLAMA, *GENERAL_KEYS, *(f"llama.{key}" for key in OWN_KEYS.split())]


@given(
    changes=st.dictionaries(st.sampled_from(KEYS), scalar, max_size=6),
    state=st.booleans(),
    architecture=st.sampled_from(["llama", "gemma3", "gemma3n", "deepseek2", "mamba", "gpt-oss", "bert", "nonsense"]),
)
@QUICK
def test_known_keys_of_any_type_and_value_never_surprise(
    changes: dict[str, Any], state: bool, architecture: str
) -> None:
    metadata = {**LLAMA, **changes}
    if "general.architecture" not in changes:
        metadata = {key.replace("llama.", f"{architecture}."): value for key, value in metadata.items()}
        metadata["general.architecture"] = architecture
    tensors = llama_tensors()
    if state:
        tensors = [*tensors, TensorSpec("blk.1.ssm_in.weight", (64, 32), 2)]
    understand(Maker(metadata=list(metadata.items()), tensors=tensors).build(), None)


value = st.one_of(st.none(), st.integers(-2, 1 << 64), st.floats(), st.text(max_size=5), st.lists(st.integers(-1, 9)))


@given(changes=st.dictionaries(st.text(max_size=8), st.one_of(value, st.dictionaries(st.text(max_size=8), value))))
@QUICK
def test_a_stored_summary_of_any_shape_never_surprises(
    tiny: Callable[..., bytes], changes: dict[str, Any], written: Callable[[bytes], Path]
) -> None:
    parser = HeaderParser()
    parser.feed(tiny())
    assert parser.header is not None
    found = gguf.summary(parser.header)
    names = sorted(found)
    found |= {
        names[len(key) % len(names)] if index % 2 else key: item for index, (key, item) in enumerate(changes.items())
    }
    with contextlib.suppress(PierError):
        assert estimate(found, context=512).total >= 0


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Two GiB more than now: whoever builds from a claimed count gets a MemoryError, not the machine's last page."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="session")
def real_header(smollm2: Path) -> bytes:
    with smollm2.open("rb") as file:
        return file.read(gguf.read_file(smollm2).data_offset)


def test_string_constants_of_the_builder_agree() -> None:
    assert STRING not in PACK
