"""DDUF: pipelines of diffusion models in one archive, and archives that lie."""

from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import CorruptData, PierError
from pierhead.formats import dduf as reader
from pierhead.formats.reading import File, run
from pierhead.formats.summarize import summarize

from .foreign import dduf, safetensors

pytestmark = pytest.mark.timeout(30)
INDEX = json.dumps({"_class_name": "FluxPipeline"}).encode()
WEIGHTS = safetensors({"a": ("BF16", [4, 4], 32)})


def look(path: Path) -> dict[str, Any]:
    return summarize([File(path.name, path.stat().st_size, "weights", "dduf")], {path.name: path})


def test_a_pipeline_tells_its_class_and_the_weights_of_its_parts(tmp_path: Path) -> None:
    members = {"model_index.json": INDEX, "unet/model.safetensors": WEIGHTS, "vae/model.safetensors": WEIGHTS}

    found = look(dduf(tmp_path / "m.dduf", members))

    assert (found["format"], found["class"]) == ("dduf", "FluxPipeline")
    assert (found["parameters"], found["weights_bytes"], found["quantization"]) == (32, 64, "BF16")


@pytest.mark.parametrize(
    ("members", "method", "reason"),
    [
        ({"model_index.json": INDEX}, zipfile.ZIP_DEFLATED, "compressed"),
        ({"config.json": INDEX}, zipfile.ZIP_STORED, "model_index"),
        ({"model_index.json": INDEX, "../out": b"x"}, zipfile.ZIP_STORED, "not allowed"),
        ({"model_index.json": INDEX, "a/b/c": b"x"}, zipfile.ZIP_STORED, "not allowed"),
        ({"model_index.json": INDEX, "a.safetensors": b"no"}, zipfile.ZIP_STORED, "safetensors"),
    ],
)
def test_other_archives_are_refused(members: dict[str, bytes], method: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match=reason):
        look(dduf(tmp_path / "m.dduf", members, method))


@pytest.mark.parametrize("cut", [0, 10, 100, 200])
def test_a_cut_archive_is_refused(cut: int, tmp_path: Path) -> None:
    path = dduf(tmp_path / "m.dduf", {"model_index.json": INDEX, "unet/model.safetensors": WEIGHTS})
    path.write_bytes(path.read_bytes()[:cut])

    with pytest.raises(CorruptData):
        look(path)


@given(st.data())
def test_a_damaged_archive_ends_in_a_directory_or_a_clear_error(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = dduf(tmp_path_factory.mktemp("d") / "m.dduf", {"model_index.json": INDEX, "a.safetensors": WEIGHTS})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PierError):
        run(reader.read_directory(File("m", len(raw))), lambda _, offset, length: bytes(raw[offset : offset + length]))
