"""Headers of Whisper models in GGML files: what they tell, and files that are damaged or something else."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engines.whisper import models

from pierhead.errors import CorruptData
from pierhead.formats import whisper
from pierhead.formats.reading import File
from pierhead.formats.summarize import check_file, glance, summarize
from pierhead.formats.whisper_estimate import estimate_whisper
from pierhead.store.classify import classify

BASE = (51865, 1500, 512, 8, 6, 448, 512, 8, 6, 80, 1)
SIZE = 147_951_465  # of ggml-base.bin


def header(*sizes: int) -> bytes:
    return struct.pack("<4s11i", b"lmgg", *sizes)


def changed(place: int, value: int) -> bytes:
    return header(*BASE[:place], value, *BASE[place + 1 :])


def test_a_header_tells_size_languages_and_quantization() -> None:
    base = whisper.parse(header(*BASE))
    assert base.multilingual
    assert base.quantization == "F16"
    assert base.parameters == pytest.approx(72.6e6, rel=0.001)
    assert base.least <= SIZE
    told = whisper.summary(base, SIZE)
    assert (told["architecture"], told["size_label"], told["vocab_size"]) == ("whisper", "base", 51865)
    english = whisper.parse(changed(0, 51864))
    assert not english.multilingual
    assert whisper.parse(changed(10, 2008)).quantization == "Q5_0"
    large = (51866, 1500, 1280, 20, 32, 448, 1280, 20, 4, 128, 1)
    assert whisper.summary(whisper.parse(header(*large)), 1)["size_label"] == "turbo"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ggml-base.bin", ("weights", "ggml")),
        ("ggml-large-v3-turbo-q5_0.bin", ("weights", "ggml")),
        ("for-tests-ggml-tiny.en.bin", ("weights", "ggml")),
        ("models/ggml-tiny.bin", ("weights", "ggml")),
        ("whisper.ggml", ("weights", "ggml")),
        ("ggml-silero-v5.1.2.bin", ("weights", "data")),
        ("pytorch_model.bin", ("weights", "pytorch")),
        ("gggml.bin", ("weights", "pytorch")),
    ],
)
def test_models_are_known_by_the_names_that_whisper_cpp_gives_them(name: str, kind: tuple[str, str]) -> None:
    assert classify(name) == kind


def test_a_whole_file_is_summarized_and_a_short_one_refused(tmp_path: Path) -> None:
    path = models.whisper(tmp_path / "ggml-tiny.bin")
    found = summarize([File(path.name, path.stat().st_size, "weights", "ggml")], {path.name: path})
    assert (found["format"], found["architecture"]) == ("ggml", "whisper")
    assert found["whisper"]["n_text_layer"] == 1
    assert found["parameters"] == pytest.approx(path.stat().st_size / 2, rel=0.1)
    check_file(path, "ggml")
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(CorruptData, match=r"has 1000000 bytes, its tensors need \d+: it is cut short"):
        check_file(path, "ggml")


def test_several_models_of_a_folder_are_told_apart(tmp_path: Path) -> None:
    paths = [models.whisper(tmp_path / "ggml-a.bin"), models.whisper(tmp_path / "ggml-b.en.bin", multilingual=False)]
    files = [File(p.name, p.stat().st_size, "weights", "ggml") for p in paths]
    found = summarize(files, {p.name: p for p in paths})
    assert found["whisper"]["multilingual"]
    assert not found["variants"]["ggml-b.en.bin"]["multilingual"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GGUF" + bytes(100), "instead of"),
        (b"lmgg" + bytes(100), "n_vocab=0"),
        (header(*BASE)[:20], "ends at byte 20"),
        (changed(2, 1 << 30), "n_audio_state=1073741824"),
        (changed(4, -1), "n_audio_layer=-1"),
        (changed(3, 7), "heads do not divide"),
    ],
)
def test_a_file_that_is_none_of_whisper_s_says_why(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "ggml-bad.bin"
    path.write_bytes(data)
    with pytest.raises(CorruptData, match="not a usable GGML file") as refused:
        check_file(path, "ggml")
    assert reason in refused.value.message


@given(st.binary(max_size=80))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for whole in (data, b"lmgg" + data):
        try:
            made = whisper.parse(whole)
        except CorruptData:
            continue
        assert made.least > 0


def test_the_first_bytes_tell_it_from_something_else() -> None:
    glance(header(*BASE), File("ggml-a.bin", None, "weights", "ggml"))
    with pytest.raises(CorruptData):
        glance(b"\x80\x02}q\x00", File("ggml-a.bin", None, "weights", "ggml"))


def test_an_estimate_counts_weights_caches_work_and_sound() -> None:
    metadata: dict[str, Any] = {"whisper": whisper.parse(header(*BASE))._asdict()}

    def of(**more: int) -> dict[str, int]:
        given = {"size": SIZE, "workers": 1, "decoders": 1, "seconds": 60, "body": 1 << 20} | more
        return estimate_whisper(metadata, **given).to_dict()

    one = of()
    assert one["kv_cache"] == 28_311_552, "what whisper.cpp says of base: 6.29, 18.87 and 3.15 MB"
    assert one["compute"] == pytest.approx(140.4e6 + 1e6 + 60 * 179_200, rel=0.03), (
        "and 16.28, 23.09, 4.66 and 96.37 MB"
    )
    assert of(workers=2)["weights"] == 2 * SIZE
    assert of(decoders=5)["kv_cache"] > one["kv_cache"]
    assert of(seconds=7200)["total"] == of(seconds=600)["total"], "sound is worked on in pieces"
    assert estimate_whisper({}, size=SIZE, workers=1, decoders=1, seconds=60, body=0).total > SIZE
