"""What the speech engine's server refuses: bad sound, bad forms, too much; and that it goes on after that."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import models, sounds
from .conftest import Serve, Served

pytestmark = pytest.mark.timeout(120)
SOUND = sounds.wav()
LONG = sounds.wav(900, rate=8000, bits=8)  # hundreds of windows for a model that says two seconds of each


BAD = {
    "text": b"this is no sound at all, just words that go on and on",
    "json": b'{"a": 1}' * 100,
    "a pdf": b"%PDF-1.7\n" + b"0" * 1000,
    "a playlist": b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n",
    "a list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "riff without wave": b"RIFF\x24\x00\x00\x00AVI LIST" + b"\0" * 200,
    "a wav header alone": sounds.header(0),
    "a wav header cut short": sounds.wav()[:20],
    "a wav without a form": struct.pack("<4sI4s4sI", b"RIFF", 100, b"WAVE", b"data", 64) + b"\0" * 64,
    "a wav of no channels": sounds.header(1000, channels=0) + b"\0" * 1000,
    "a wav of 9999 channels": sounds.header(40_000, channels=9999) + b"\0" * 40_000,
    "a wav of an unknown codec": sounds.header(1000, kind=0x7777) + b"\0" * 1000,
    "a wav of 500 samples a second": sounds.header(100_000, rate=500) + b"\0" * 100_000,
    "a wav of four thousand million a second": sounds.header(100_000, rate=(1 << 32) - 1) + b"\0" * 100_000,
    "a wav of two samples": sounds.header(4) + b"\0" * 4,
    "flac of noise": b"fLaC" + random.Random(1).randbytes(5000),
    "ogg of noise": b"OggS" + random.Random(2).randbytes(5000),
    "mp3 of zeros": b"ID3\x04\0\0\0\0\0\0" + b"\0" * 5000,
    "mp4 of noise": b"\0\0\0\x20ftypM4A " + random.Random(3).randbytes(5000),
    "webm of noise": b"\x1a\x45\xdf\xa3" + random.Random(4).randbytes(5000),
    "mpeg of noise": b"\x00\x00\x01\xba" + random.Random(5).randbytes(5000),
    "aiff of nothing": b"FORM\0\0\0\x04AIFF",
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_sound_is_the_client_s_mistake(served: Served, what: str) -> None:
    error = served.refused(BAD[what])
    assert (error["type"], error["param"]) == ("invalid_request_error", "file")
    assert error["code"] in ("invalid_audio", "audio_too_short")
    assert "passwd" not in error["message"]


def test_sound_that_breaks_off_is_heard_as_far_as_it_goes(served: Served) -> None:
    assert served.text(SOUND[: len(SOUND) - 8001]) == models.TEXT
    told = served.post(sounds.header(1 << 31) + SOUND[44:], response_format="verbose_json").json()
    assert told["duration"] == pytest.approx(2.5, abs=0.02), "whatever its header promises"


def test_samples_that_are_no_numbers_do_no_harm(served: Served) -> None:
    odd = struct.pack("<4f", float("nan"), float("inf"), float("-inf"), 1e38) * 10_000
    assert served.text(sounds.header(len(odd), bits=32, kind=sounds.FLOAT) + odd) == models.TEXT


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_heard_or_refused_and_never_end_the_server(served: Served, data: st.DataObject) -> None:
    base = bytearray(SOUND[:20_000])
    for _ in range(data.draw(st.integers(1, 30))):
        base[data.draw(st.integers(0, 60))] = data.draw(st.integers(0, 255))
    response = served.post(bytes(base), language="en")
    assert response.status_code in (200, 400, 413), response.text
    assert served.client.get("/health").status_code == 200


def test_a_form_without_what_is_needed_is_refused_with_the_field(served: Served) -> None:
    assert served.refused(None)["param"] == "file"
    assert served.refused(b"")["param"] == "file"
    for field, value in (
        ("response_format", "docx"), ("temperature", "hot"), ("temperature", "2"), ("temperature", "nan"),
        ("language", "xx"), ("include[]", "everything"),
    ):  # fmt: skip
        assert served.refused(SOUND, **{field: value})["param"] == field.removesuffix("[]")
    wrong = {"response_format": "verbose_json", "timestamp_granularities[]": "syllable"}
    assert served.refused(SOUND, **wrong)["param"] == "timestamp_granularities"
    assert "verbose_json" in served.refused(SOUND, **{"timestamp_granularities[]": "word"})["message"]
    assert served.refused(SOUND, prompt="word " * 5000)["param"] == "prompt"


def test_what_is_no_form_is_refused(served: Served) -> None:
    def status(body: bytes, kind: str) -> int:
        return served.client.post("/v1/audio/transcriptions", content=body, headers={"content-type": kind}).status_code

    assert status(b"{}", "application/json") == 415
    assert status(b"x", "multipart/form-data") == 415
    assert status(b"x", "multipart/form-data; boundary=b") == 400
    assert (
        status(b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc', "multipart/form-data; boundary=b")
        == 400
    )
    assert (
        status(
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 200 + b"--b--",
            "multipart/form-data; boundary=b",
        )
        == 400
    )
    assert served.client.get("/v1/audio/transcriptions").status_code == 404
    assert served.client.post("/v1/chat/completions").status_code == 404
    assert served.client.put("/health").status_code == 405


@pytest.fixture(scope="module")
def bounded(starts: Serve, folder: Path) -> Served:
    """A server with small bounds."""
    return starts(folder, max_seconds=1000, max_body_mb=8, queue=1).wait()


def test_too_large_and_too_long_is_refused_before_any_work(bounded: Served) -> None:
    error = bounded.refused(b"\0" * (9 << 20), 413)
    assert error["code"] == "too_large"
    assert "8 MiB" in error["message"]
    slow = sounds.header(8 << 20, rate=4000, bits=8) + b"\x80" * (7 << 20)
    with _watching(bounded) as peak:
        assert bounded.refused(slow, 413)["code"] == "audio_too_long"
    assert peak() < 100 << 20
    assert bounded.counted("whisper_audio_seconds_total") == 0


@contextlib.contextmanager
def _watching(served: Served) -> Iterator[Any]:
    """How many bytes its memory grew by while something happened."""
    process = psutil.Process(served.process.pid)
    base, done, most = process.memory_info().rss, threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], process.memory_info().rss - base)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        done.set()
        thread.join()


def form(sound: bytes, *, more: bytes = b"") -> bytes:
    """A request on the wire."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        + sound
        + more
        + b"\r\n--b--\r\n"
    )
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: e\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def until(served: Served, name: str, wanted: float) -> None:
    """Wait for one of its figures; asking is the pause."""
    limit = time.monotonic() + 30
    while served.counted(name) != wanted:
        assert time.monotonic() < limit, f"{name} is {served.counted(name)}, not {wanted}"


def test_a_client_that_leaves_stops_the_work_and_frees_its_place(bounded: Served) -> None:
    cancelled = bounded.counted("whisper_cancelled_total")
    leaving = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    leaving[0].connect(bounded.path)
    leaving[0].sendall(form(LONG))
    until(bounded, "whisper_running", 1)
    leaving[1].connect(bounded.path)
    leaving[1].sendall(form(LONG))
    until(bounded, "whisper_queue_size", 1)
    refused = bounded.post(SOUND)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    for client in leaving:
        client.close()
    until(bounded, "whisper_running", 0)
    assert bounded.counted("whisper_cancelled_total") == cancelled + 2
    assert bounded.text(SOUND) == models.TEXT


def test_it_answers_questions_while_it_works_and_ends_when_told(starts: Serve, folder: Path) -> None:
    busy = starts(folder).wait()
    client = socket.socket(socket.AF_UNIX)
    client.connect(busy.path)
    client.sendall(form(LONG))
    until(busy, "whisper_running", 1)
    began = time.monotonic()
    assert busy.client.get("/health").json() == {"status": "ok"}
    assert time.monotonic() - began < 2
    assert busy.client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    client.close()
    busy.process.terminate()
    assert busy.process.wait(20) in (0, -15)


def test_metrics_count_requests_sound_and_tokens(served: Served) -> None:
    sound, tokens = served.counted("whisper_audio_seconds_total"), served.counted("whisper_generated_tokens_total")
    served.text(SOUND)
    assert served.counted("whisper_audio_seconds_total") == pytest.approx(sound + 2.5)
    assert served.counted("whisper_generated_tokens_total") == tokens + 7
    page = served.client.get("/metrics").text
    assert 'whisper_requests_total{status="200"}' in page
    assert 'whisper_request_seconds_bucket{le="+Inf"}' in page


MODELS: dict[str, tuple[Any, str]] = {
    "a text": (lambda _: b"no model", "instead of b'lmgg'"),
    "cut in the header": (lambda whole: whole[:30], "ends inside its header"),
    "cut in the vocabulary": (lambda whole: whole[: 48 + 8 + 4 * 80 * 201 + 10], "ends inside the vocabulary"),
    "cut in its numbers": (lambda whole: whole[: len(whole) - 20_000], "ends inside the tensor decoder.blocks.0.mlp"),
    "cut between tensors": (lambda whole: whole[: whole.index(b"decoder.blocks.0.mlp.2.bias") - 16], "not all tensors"),
    "a word of two thousand million bytes": (
        lambda whole: whole[: 48 + 8 + 4 * 80 * 201 + 4] + b"\xff\xff\xff\x7f" + whole[48 + 8 + 4 * 80 * 201 + 8 :],
        "bytes long",
    ),
    "dimensions beyond all bounds": (lambda whole: whole[:4] + b"\xff\xff\xff\x7f" * 11 + whole[48:], "dimensions"),
    "a tensor that nobody knows": (
        lambda whole: whole.replace(b"encoder.ln_post", b"encoder.ln_past"),
        "unknown tensor",
    ),
    "heads that do not divide": (lambda whole: whole[:16] + struct.pack("<i", 128) + whole[20:], "heads"),
    "other sizes than its header says": (lambda whole: whole[:12] + struct.pack("<i", 128) + whole[16:], "wrong"),
}


@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_cannot_be_served_gives_its_reason_in_one_line(
    starts: Serve, folder: Path, tmp_path: Path, what: str
) -> None:
    spoil, reason = MODELS[what]
    plan = starts.plan(folder)
    (tmp_path / "ggml-tiny.bin").write_bytes(spoil((folder / "ggml-tiny.bin").read_bytes()))
    broken = starts(tmp_path, plan=plan)
    assert broken.process.wait(30) == 1
    last = broken.log.read_text().strip().splitlines()[-1]
    assert last.startswith("engine: ")
    assert reason in last
    assert len(last) < 300


def test_an_unknown_language_in_the_settings_is_told_at_the_start(starts: Serve, folder: Path) -> None:
    broken = starts(folder, language="klingon")
    assert broken.process.wait(30) == 1
    assert "engine: There is no language 'klingon'" in broken.log.read_text()


def test_http_errors_of_the_transport_are_no_crash(served: Served) -> None:
    with contextlib.suppress(httpx.HTTPError):
        served.client.request(
            "POST", "/v1/audio/transcriptions", content=b"x" * 10, headers={"content-type": "?" * 100}
        )
    assert served.client.get("/health").status_code == 200
