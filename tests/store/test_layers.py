"""Layers: what each media type and annotation of both specifications means, and names where an artifact gives none."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import CorruptData
from pierhead.store.classify import classify
from pierhead.store.index import Descriptor
from pierhead.store.layers import files_of
from pierhead.store.media import CNCF, DIR_TAR, FILE, FILEPATH, GGUF, LICENSE, LORA, MMPROJ, ROLE, SAFETENSORS, TEMPLATE

pytestmark = pytest.mark.timeout(30)


def layer(kind: str, **annotations: str) -> Descriptor:
    names = {"path": FILEPATH, "role": ROLE, "title": "org.opencontainers.image.title", "scale": "ai.pierhead.scale"}
    digest = "sha256:" + (kind + repr(annotations)).encode().hex().ljust(64, "0")[:64]
    return Descriptor(kind, digest, 1, annotations={names[key]: value for key, value in annotations.items()})


def test_layers_without_a_path_get_names_that_tell_what_they_are() -> None:
    one = files_of([layer(GGUF), layer(MMPROJ), layer(TEMPLATE), layer(LICENSE), layer(LICENSE), layer(LORA)], {})
    split = files_of([layer(GGUF)] * 3, {})
    tensors = files_of([layer(SAFETENSORS)], {})

    assert [f.name for f in one] == [
        "model.gguf", "mmproj.gguf", "template.jinja", "LICENSE", "LICENSE-2", "lora.gguf",
    ]  # fmt: skip
    assert [f.name for f in split] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert [f.name for f in tensors] == ["model.safetensors"]


def test_a_name_that_another_layer_has_is_not_given_twice() -> None:
    found = files_of([layer(GGUF, path="mmproj.gguf"), layer(MMPROJ)], {})

    assert [f.name for f in found] == ["mmproj.gguf", "mmproj-2.gguf"]


def test_what_other_tools_call_a_file_counts_where_no_path_is_given() -> None:
    assert files_of([layer(GGUF, title="tiny.gguf")], {})[0].name == "tiny.gguf"


@pytest.mark.parametrize(
    ("kind", "told", "config", "expected"),
    [
        (f"{CNCF}weight.v1.raw", {"path": "a.safetensors"}, {}, ("weights", "safetensors", "raw")),
        (f"{CNCF}weight.v1.raw", {"path": "weights"}, {"config": {"format": "GGUF"}}, ("weights", "gguf", "raw")),
        (f"{CNCF}weight.v1.raw", {"path": "x/mmproj-f16.gguf"}, {}, ("mmproj", "gguf", "raw")),
        (f"{CNCF}weight.v1.tar+zstd", {"path": "a.gguf"}, {}, ("weights", "gguf", "tar+zstd")),
        (f"{CNCF}weight.config.v1.raw", {"path": "t.jinja", "role": "template"}, {}, ("template", "", "raw")),
        (f"{CNCF}weight.v1.raw", {"path": "l.gguf", "role": "lora"}, {}, ("lora", "gguf", "raw")),
        (f"{CNCF}doc.v1.tar+gzip", {}, {}, ("doc", "", "tar+gzip")),
        (f"{CNCF}code.v1.raw", {"path": "m.py"}, {}, ("code", "", "raw")),
        (f"{CNCF}dataset.v1.tar", {}, {}, ("dataset", "", "tar")),
        (FILE, {"path": "model.onnx"}, {}, ("weights", "onnx", "raw")),
        (FILE, {"path": "model.onnx_data", "role": "weights"}, {}, ("weights", "data", "raw")),
        (FILE, {"path": "config.json"}, {}, ("other", "", "raw")),
        (FILE, {"path": "config.json", "role": "nonsense"}, {}, ("other", "", "raw")),
        (DIR_TAR, {}, {}, ("other", "", "tar")),
        ("application/x-unknown", {"path": "x"}, {}, ("other", "", "raw")),
    ],
)
def test_types_of_both_specifications_are_known(
    kind: str, told: dict[str, str], config: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    found = files_of([layer(kind, **told)], config)[0]

    assert (found.role, found.format, found.packing) == expected


@pytest.mark.parametrize(("text", "scale"), [("0.5", 0.5), ("", 1.0), ("much", 1.0), ("nan", 1.0), ("1e9", 1.0)])
def test_a_lora_s_scale_is_a_number_or_one(text: str, scale: float) -> None:
    assert files_of([layer(LORA, scale=text)], {})[0].scale == scale


@given(st.dictionaries(st.sampled_from([FILEPATH, ROLE, "org.opencontainers.image.title"]), st.text(max_size=40)))
def test_any_annotations_end_in_a_path_inside_or_an_error(annotations: dict[str, str]) -> None:
    with contextlib.suppress(CorruptData):
        name = files_of([Descriptor(GGUF, "sha256:" + "0" * 64, 1, annotations=annotations)], {})[0].name
        assert not name.startswith("/")
        assert ".." not in name.split("/")


@pytest.mark.parametrize(
    ("path", "role", "format"),
    [
        ("a/model-00001-of-00002.safetensors", "weights", "safetensors"),
        ("mmproj-model.gguf", "mmproj", "gguf"),
        ("x.mmproj", "mmproj", "gguf"),
        ("chat_template.jinja", "template", ""),
        ("chat_template.json", "config", ""),
        ("LICENSE.txt", "license", ""),
        ("USE_POLICY.md", "license", ""),
        ("README.md", "doc", ""),
        ("tokenizer.model", "config", ""),
        ("modeling.py", "code", ""),
        ("train.parquet", "dataset", ""),
        ("model.onnx_data", "weights", "data"),
        ("pytorch_model.bin", "weights", "pytorch"),
        ("strange", "other", ""),
    ],
)
def test_a_file_s_name_tells_what_it_is_for(path: str, role: str, format: str) -> None:
    assert classify(path) == (role, format)
