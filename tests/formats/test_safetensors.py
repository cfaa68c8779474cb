"""Safetensors: one file and many, what the folder tells, and headers that lie."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pierhead.errors import CorruptData, PierError
from pierhead.formats.estimate import estimate
from pierhead.formats.reading import File
from pierhead.formats.summarize import check_file, summarize, summarize_remote
from pierhead.store.classify import classify

from .foreign import LLAMA, llama_folder, raw_safetensors, safetensors

pytestmark = pytest.mark.timeout(30)


def look(folder: Path) -> dict[str, Any]:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = [File(name, (folder / name).stat().st_size, *classify(name)) for name in names]
    return summarize(files, {name: folder / name for name in names})


def refused(data: bytes, tmp_path: Path) -> str:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptData) as caught:
        check_file(path, "safetensors")
    return caught.value.message


def test_a_file_that_the_format_s_own_library_wrote_is_read(tmp_path: Path) -> None:
    arrays = {"a": numpy.zeros((3, 5), numpy.float32), "b.weight": numpy.zeros((7,), numpy.float16)}
    save_file(arrays, tmp_path / "model.safetensors", {"format": "np"})

    found = look(tmp_path)

    assert (found["format"], found["parameters"], found["weights_bytes"]) == ("safetensors", 22, 74)
    assert (found["tensor_count"], found["quantization"]) == (2, "F32")


def test_a_folder_tells_architecture_shape_and_chat_template(tmp_path: Path) -> None:
    found = look(llama_folder(tmp_path, shards=3, template="{{ messages }}"))

    assert found["architecture"] == "llama"
    assert (found["layers"], found["heads"], found["heads_kv"], found["head_dim_k"]) == (4, 8, 2, 8)
    assert (found["context_length"], found["vocab_size"]) == (2048, 320)
    assert (found["chat_template"], found["quantization"], found["dtype"]) == ("{{ messages }}", "BF16", "bfloat16")
    assert (found["shards_read"], found["tensor_count"]) == (3, 3)


def test_its_cache_is_estimated_like_that_of_a_gguf(tmp_path: Path) -> None:
    found = estimate(look(llama_folder(tmp_path)), context=1024)

    assert found.kv_cache == 1024 * 4 * 2 * 2 * 8 * 2  # cells, layers, K and V, heads, their width, f16
    assert found.weights == 64 * 320 * 2


def test_a_template_of_its_own_counts_before_the_tokenizer_s(tmp_path: Path) -> None:
    llama_folder(tmp_path, template="old")
    (tmp_path / "chat_template.jinja").write_text("new")

    assert look(tmp_path)["chat_template"] == "new"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    llama_folder(tmp_path)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))

    assert look(tmp_path)["chat_template"] == "D"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 512 + 64),  # one vector for all heads, V inside of it
        ({"multi_query": True, "num_key_value_heads": None}, 2 * 8),
        ({"layer_types": ["linear_attention"] * 4}, 0),
        ({"model_type": "bert"}, 0),
        ({"text_config": {**LLAMA, "num_key_value_heads": 1}}, 2 * 8),
    ],
)
def test_kinds_of_attention_change_the_cache(config: dict[str, Any], expected: int, tmp_path: Path) -> None:
    llama_folder(tmp_path)
    given = {k: v for k, v in {**LLAMA, **config}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(given))

    layers = 4
    assert estimate(look(tmp_path), context=256).kv_cache == 256 * layers * expected * 2


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    llama_folder(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()

    with pytest.raises(CorruptData, match=r"model-00002-of-00003\.safetensors"):
        look(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CorruptData, match=r"model-00002-of-00003\.safetensors"):
        look(tmp_path)


async def test_only_the_header_of_a_remote_file_is_fetched() -> None:
    data = safetensors({"a": ("F32", [1 << 18], 1 << 20)})
    asked: list[tuple[int, int]] = []

    async def fetch(name: str, offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return data[offset : offset + length]

    found = await summarize_remote([File("m.safetensors", len(data), "weights", "safetensors")], fetch)

    assert found["parameters"] == 1 << 18
    assert sum(length for _, length in asked) <= 64 << 10


def entry(dtype: str = "F32", shape: Any = None, offsets: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": offsets or [0, 4]}


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', 4, "appears twice"),
        ({"a": entry(), "b": entry()}, 4, "overlap"),
        ({"a": entry(), "b": entry(offsets=[8, 12])}, 12, "gap"),
        ({"a": entry()}, 8, "end at byte"),
        ({"a": entry(offsets=[0, 8])}, 8, "takes 8 bytes"),
        ({"a": entry(shape=[1 << 40, 1 << 40])}, 4, "impossible shape"),
        ({"a": entry(shape=[-1])}, 4, "impossible shape"),
        ({"a": entry(shape=[1.0])}, 4, "impossible shape"),
        ({"a": entry(shape=[True])}, 4, "impossible shape"),
        ({"a": entry(shape=[1] * 40)}, 4, "impossible shape"),
        ({"a": entry("F99")}, 4, "unknown type"),
        ({"a": entry(offsets=[4, 0])}, 4, "takes -4 bytes"),
        ({"a": entry(offsets=[0])}, 4, "impossible place"),
        ({"a": 7}, 0, "no tensor"),
        ({"a" * 600: entry()}, 4, "no tensor"),
        ({"__metadata__": {"a": 1}}, 0, "metadata"),
        (b"[" * 200_000 + b"]" * 200_000, 0, "begin like one"),
        (b'{"a":' + b"[" * 200_000 + b"}", 0, "should be JSON"),
        (b'{"a":NaN}', 0, "should be JSON"),
        (b"{", 0, "2 to"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, size: int, reason: str, tmp_path: Path) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()

    assert reason in refused(raw_safetensors(raw, size), tmp_path)


@pytest.mark.parametrize("length", [0, 1, 17 << 20, 1 << 63, (1 << 64) - 1])
def test_a_length_beyond_all_bounds_is_refused_before_anything_is_read(length: int, tmp_path: Path) -> None:
    assert "header claims" in refused(struct.pack("<Q", length) + b"{}" * 20, tmp_path)


def test_a_web_page_is_no_model(tmp_path: Path) -> None:
    assert "not a usable safetensors file" in refused(b"<!doctype html><html>sign in</html>", tmp_path)


@given(st.binary(max_size=400), st.integers(0, 600))
def test_any_bytes_end_in_a_summary_or_a_clear_error(raw: bytes, claimed: int) -> None:
    from pierhead.formats.reading import run
    from pierhead.formats.safetensors import read_header

    data = struct.pack("<Q", claimed) + raw
    with contextlib.suppress(PierError):
        run(read_header(File("x", len(data))), lambda _, offset, length: data[offset : offset + length])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*LLAMA, "layer_types", "text_config", "kv_lora_rank"]), json_values))
def test_any_config_ends_in_a_summary_or_a_clear_error(config: dict[str, Any]) -> None:
    from pierhead.formats.hf_config import quantization, shape

    with contextlib.suppress(PierError):
        found = shape(config)
        estimate({**found, "weights_bytes": 1, "state": {}}, context=256)
        quantization({"quantization_config": config})
