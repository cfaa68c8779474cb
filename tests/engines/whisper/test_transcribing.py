"""The speech engine's server on its own: forms of answers, languages, words, streams, kinds of files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pierhead.engines.base import LaunchSpec

from . import models, sounds
from .conftest import Serve, Served

pytestmark = pytest.mark.timeout(120)
SOUND = sounds.wav()


def test_sound_becomes_text_with_its_length_as_usage(served: Served) -> None:
    response = served.post(SOUND)
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"text": models.TEXT, "usage": {"type": "duration", "seconds": 3}}


def test_plain_text_and_subtitles_are_what_players_read(served: Served) -> None:
    assert served.post(SOUND, response_format="text").text == f"{models.TEXT}\n"
    srt = "1\n00:00:00,000 --> 00:00:01,000\nhello world.\n\n2\n00:00:01,020 --> 00:00:02,000\nhow are you?\n\n"
    assert served.post(SOUND, response_format="srt").text == srt
    vtt = served.post(SOUND, response_format="vtt")
    assert vtt.headers["content-type"].startswith("text/vtt")
    assert vtt.text.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nhello world.\n\n")


def test_the_long_form_has_segments_and_where_they_are_asked_for_words(served: Served) -> None:
    both = {"response_format": "verbose_json", "timestamp_granularities[]": ["word", "segment"]}
    told = served.post(SOUND, **both).json()
    assert (told["task"], told["language"], told["duration"], told["text"]) == (
        "transcribe", "english", 2.5, models.TEXT,
    )  # fmt: skip
    first, second = told["segments"]
    assert (first["id"], first["start"], first["end"], first["text"]) == (0, 0.0, 1.0, " hello world.")
    assert second["text"] == " how are you?"
    assert first["avg_logprob"] == pytest.approx(0, abs=0.01)
    assert len(first["tokens"]) == 3
    words = told["words"]
    assert [w["word"] for w in words] == ["hello", "world", "how", "are", "you"]
    assert all(0 <= w["start"] <= w["end"] <= 2.0 for w in words)
    assert [w["start"] for w in words] == sorted(w["start"] for w in words)
    only = served.post(SOUND, **(both | {"timestamp_granularities[]": "word"})).json()
    assert "words" in only
    assert "segments" not in only
    assert "words" not in served.post(SOUND, response_format="verbose_json").json()


def test_translations_say_it_in_english(served: Served) -> None:
    assert served.text(SOUND, "translations", prompt="As a sailor would say it.") == "good day!"
    told = served.post(SOUND, "translations", response_format="verbose_json").json()
    assert (told["task"], told["text"]) == ("translate", "good day!")


def test_a_language_can_be_named_by_code_or_by_name(served: Served) -> None:
    for given, name in (
        ("de", "german"),
        ("German", "german"),
        ("haitian creole", "haitian creole"),
        ("auto", "english"),
    ):
        told = served.post(SOUND, language=given, response_format="verbose_json").json()
        assert told["language"] == name
    assert "ISO 639-1" in served.refused(SOUND, language="klingon")["message"]


def test_logprobs_of_tokens_come_where_they_are_asked_for(served: Served) -> None:
    told = served.post(SOUND, **{"include[]": "logprobs"}).json()["logprobs"]
    assert [one["token"] for one in told[:3]] == [" hello", " world", "."]
    assert told[0]["bytes"] == list(b" hello")


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_a_stream_tells_each_segment_and_at_last_all(served: Served) -> None:
    response = served.post(SOUND, stream="true")
    assert response.headers["content-type"].startswith("text/event-stream")
    told = events(response.text)
    assert [one["type"] for one in told] == ["transcript.text.delta"] * 2 + ["transcript.text.done"]
    assert "".join(one["delta"] for one in told[:-1]) == told[-1]["text"] == models.TEXT
    assert told[-1]["usage"] == {"type": "duration", "seconds": 3}
    assert "no sound" in served.refused(b"junk" * 100, stream="true")["message"]


def test_long_sound_is_worked_on_in_pieces_and_nothing_is_said_twice(starts: Serve, folder: Path) -> None:
    plan = starts.plan(folder)
    small = json.loads(plan.argv[-1]) | {"piece": 60}
    pieced = starts(folder, plan=_with(plan, small)).wait()
    sound = sounds.wav(150, rate=8000)
    long = pieced.post(sound, response_format="verbose_json").json()
    assert long["duration"] == 150.0
    starts_at = [segment["start"] for segment in long["segments"]]
    assert starts_at == sorted(set(starts_at)), "in order, none twice"
    assert [s["id"] for s in long["segments"]] == list(range(len(starts_at)))
    assert starts_at[-1] > 110
    told = events(pieced.post(sound, stream="true").text)
    assert "".join(one["delta"] for one in told[:-1]).strip() == told[-1]["text"] == long["text"]


def _with(plan: LaunchSpec, settings: dict[str, Any]) -> LaunchSpec:
    return msgspec.structs.replace(plan, argv=(*plan.argv[:-1], json.dumps(settings)))


WAVS = [
    *itertools.product((8000, 11025, 44_100, 48_000), (1, 2), ((16, sounds.PCM),)),
    *((16_000, 1, (bits, sounds.PCM)) for bits in (8, 24, 32)),
    *((22_050, 2, (bits, sounds.FLOAT)) for bits in (32, 64)),
    (96_000, 6, (16, sounds.PCM)),
]


@pytest.mark.parametrize(("rate", "channels", "form"), WAVS)
def test_wav_files_of_all_kinds_are_read(served: Served, rate: int, channels: int, form: tuple[int, int]) -> None:
    sound = sounds.wav(2.5, rate=rate, channels=channels, bits=form[0], kind=form[1])
    told = served.post(sound, response_format="verbose_json").json()
    assert told["duration"] == pytest.approx(2.5, abs=0.02)


OTHERS = {"flac": "flac", "mp3": "libmp3lame", "ogg": "libopus", "webm": "libopus", "mp4": "aac", "adts": "aac"}


@pytest.mark.parametrize(("form", "codec"), [*OTHERS.items(), ("mpeg", "mp2"), ("aiff", "pcm_s16be")])
def test_files_of_the_field_s_other_kinds_are_read(
    served: Served, whisper_python: Path, tmp_path: Path, form: str, codec: str
) -> None:
    told = served.post(sounds.encoded(whisper_python, tmp_path, form, codec), response_format="verbose_json").json()
    assert told["duration"] == pytest.approx(3, abs=0.15)
    assert told["text"] == models.TEXT


def test_a_model_of_english_alone_says_so(starts: Serve, tmp_path: Path) -> None:
    english = starts(models.whisper(tmp_path / "ggml-tiny.en.bin", multilingual=False).parent).wait()
    assert english.text(SOUND) == models.TEXT
    assert english.text(SOUND, language="en") == models.TEXT
    assert "English only" in english.refused(SOUND, language="de")["message"]
    assert "English only" in english.refused(SOUND, task="translations")["message"]


def test_settings_change_how_it_listens(starts: Serve, folder: Path) -> None:
    settings = {"translate": True, "beam_size": 2, "language": "german", "threads": 2, "parallel": 2, "fallback": False}
    german = starts(folder, **settings).wait()
    told = german.post(SOUND, response_format="verbose_json").json()
    assert (told["text"], told["language"]) == ("good day!", "german")
