"""The speech engine's launch plans: what its program is told, which model of a folder, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pierhead.cli.hear import check_sound, form, sounds
from pierhead.engines.base import Plan, PlanRequest
from pierhead.engines.whisper import Whisper
from pierhead.errors import OutOfMemory, UsageError
from pierhead.store.model import ModelFile, ModelRecord

HEADER = {
    "n_vocab": 51865, "n_audio_ctx": 1500, "n_audio_state": 512, "n_audio_head": 8, "n_audio_layer": 6,
    "n_text_ctx": 448, "n_text_state": 512, "n_text_head": 8, "n_text_layer": 6, "n_mels": 80, "ftype": 1,
    "multilingual": True,
}  # fmt: skip
BASE = ModelFile("ggml-base.bin", 147_951_465, "weights", format="ggml")
ENGLISH = ModelFile("ggml-base.en.bin", 147_964_211, "weights", format="ggml")
SILERO = ModelFile("ggml-silero-v5.1.2.bin", 900_000, "weights", format="data")


def plan(*files: ModelFile, free: int = 8 << 30, metadata: dict[str, Any] | None = None, **settings: Any) -> Plan:
    engine = Whisper()
    facts = {"whisper": HEADER} if metadata is None else metadata
    asked = PlanRequest("r1", "m", Path("/m"), files or (BASE,), facts, engine.validate(settings), free, 8)
    return engine.plan(asked)


def told(made: Plan) -> dict[str, Any]:
    return json.loads(made.spec.argv[-1])


def test_threads_are_shared_out_among_those_that_work_at_a_time() -> None:
    assert told(plan())["threads"] == 8
    assert told(plan(workers=4))["threads"] == 2
    assert told(plan(parallel=4, threads=3))["threads"] == 3
    assert plan(parallel=2).memory > 2 * BASE.size + plan().memory - BASE.size


def test_settings_reach_the_program_under_their_own_names() -> None:
    made = told(plan(lang="de", beams=4, max_body_mb=7, max_duration=60, fallback="off", n_threads=1))
    assert (made["language"], made["beam_size"], made["max_body"], made["max_seconds"]) == ("de", 4, 7 << 20, 60)
    assert made["fallback"] is False
    with pytest.raises(UsageError, match="bad value"):
        plan(temperature=1.5)


def test_a_file_of_several_can_be_chosen() -> None:
    variants = {"whisper": HEADER, "variants": {ENGLISH.name: HEADER | {"n_vocab": 51864, "multilingual": False}}}
    assert told(plan(BASE, ENGLISH))["file"] == BASE.name
    assert told(plan(BASE, ENGLISH, metadata=variants, file=ENGLISH.name))["file"] == ENGLISH.name
    with pytest.raises(UsageError, match="has no file 'ggml-tiny") as refused:
        plan(BASE, ENGLISH, file="ggml-tiny.bin")
    assert BASE.name in (refused.value.hint or "")


def test_a_model_that_finds_speech_must_be_there() -> None:
    assert told(plan(BASE, SILERO, vad=SILERO.name))["vad"] == SILERO.name
    with pytest.raises(UsageError, match="to find speech with"):
        plan(BASE, vad=SILERO.name)


def test_a_model_of_english_alone_translates_nothing() -> None:
    english = {"whisper": HEADER | {"n_vocab": 51864, "multilingual": False}}
    assert plan(ENGLISH, metadata=english).spec.serves == ("transcriptions",)
    assert plan().spec.serves == ("transcriptions", "translations")
    assert Whisper().capabilities((ENGLISH,), english) == ("transcriptions",)


def test_what_does_not_fit_says_what_takes_how_much() -> None:
    with pytest.raises(OutOfMemory, match=r"weights 564 MiB, caches .* work .* program 96 MiB") as refused:
        plan(parallel=4, free=1 << 30)
    assert "parallel=1" in (refused.value.hint or "")


def record(*files: ModelFile) -> ModelRecord:
    return ModelRecord(name="m", names=("m",), digest="sha256:0", size=1, created="", files=files, metadata={})


def test_pier_run_asks_for_a_file_and_tells_models_that_cannot_hear(tmp_path: Path) -> None:
    sound = tmp_path / "a.MP3"
    sound.write_bytes(b"x")
    assert sounds((str(sound), "notes.txt"))
    assert not sounds(("notes.txt",))
    check_sound(record(BASE), (str(sound),))
    check_sound(record(ModelFile("model.gguf", 1, format="gguf")), ("notes.txt",))
    with pytest.raises(UsageError, match="it needs a file"):
        check_sound(record(BASE), ())
    with pytest.raises(UsageError, match="cannot hear"):
        check_sound(record(ModelFile("model.gguf", 1, format="gguf")), (str(sound),))
    with pytest.raises(UsageError, match="is not a file"):
        check_sound(record(BASE), (str(tmp_path / "none.wav"),))


def test_a_form_leaves_out_what_is_empty_and_keeps_names_in_their_quotes() -> None:
    made = form(b"\r\n--b", 'a"\r\nx.wav', {"model": "m", "prompt": ""}, "b0")
    assert made.count(b"--b0") == 3
    assert b'name="prompt"' not in made
    assert b'filename="ax.wav"\r\n' in made
