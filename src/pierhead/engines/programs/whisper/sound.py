"""Sound in any of the field's files as samples for Whisper: mono, 16 kHz, float32; a stretch at a time.

FFmpeg, through PyAV, reads the files, but only as what their first bytes show: its playlists and lists of other files,
which would have it open more, are never tried.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from typing import Any

from .faults import Refused, bad

av: Any = importlib.import_module("av")
np: Any = importlib.import_module("numpy")
RATE = 16_000
LEAST = 0.1  # seconds; whisper.cpp makes nothing of less
RATES = (1000, 768_000)  # samples a second of a file: a slower one would swell beyond all bounds
CHANNELS = 64
KNOWN = "flac, m4a, mp3, mp4, mpeg, mpga, oga, ogg, wav or webm"


def demuxer(beginning: bytes) -> str:
    """FFmpeg's name for a file's form, by its first bytes; Refused where they are nobody's."""
    if beginning[:4] in (b"RIFF", b"RF64") and beginning[8:12] == b"WAVE":
        return "wav"
    if beginning[:4] == b"FORM" and beginning[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if beginning[4:8] == b"ftyp":
        return "mp4"
    starts = {
        b"fLaC": "flac",
        b"OggS": "ogg",
        b"ID3": "mp3",
        b"\x1a\x45\xdf\xa3": "matroska",
        b"\x00\x00\x01\xba": "mpeg",
    }
    for magic, name in starts.items():
        if beginning.startswith(magic):
            return name
    if len(beginning) > 1 and beginning[0] == 0xFF and beginning[1] & 0xE0 == 0xE0:
        return "mp3" if beginning[1] & 0x06 else "aac"
    raise bad(f"The file is no sound that is known here: send {KNOWN}.", "file", "invalid_audio")


def pieces(data: bytes, seconds: int, most: int) -> Iterator[tuple[Any, bool]]:
    """Stretches of ``seconds`` and whether each is the last; Refused for what is no sound, or longer than ``most``."""
    buffer, total, wanted = bytearray(), 0, seconds * RATE * 4
    for samples in _samples(data, demuxer(data[:16]), most):
        buffer += samples
        total += len(samples)
        if total > most * RATE * 4:
            raise _too_long(most)
        while len(buffer) > wanted:
            yield _clean(buffer[:wanted]), False
            del buffer[:wanted]
    if total < LEAST * RATE * 4:
        length = f"{total / RATE / 4:.2f} seconds" if total else "no samples"
        raise bad(f"The sound is too short: {length}, at least {LEAST} seconds are needed.", "file", "audio_too_short")
    yield _clean(buffer), True


def _too_long(most: int) -> Refused:
    return Refused(413, f"The sound is longer than {most} seconds (the setting max_seconds).", "audio_too_long", "file")


def _clean(buffer: bytearray) -> Any:
    """The same memory as an array, without what is no number."""
    samples = np.frombuffer(buffer, np.float32)
    np.nan_to_num(samples, copy=False, posinf=0.0, neginf=0.0)
    return np.clip(samples, -1.0, 1.0, out=samples)


def _samples(data: bytes, form: str, most: int) -> Iterator[bytes]:
    """All samples; what follows a damaged place is left out where something came before it."""
    found = False
    try:
        with av.open(io.BytesIO(data), mode="r", format=form) as container:
            if not container.streams.audio:
                raise bad("The file has no sound in it.", "file", "invalid_audio")
            if _claimed(container, len(data)) > most + 1:
                raise _too_long(most)
            for frame in _resampled(container):
                found = found or bool(frame)
                yield frame
    except (av.error.FFmpegError, ValueError, IndexError, OverflowError, MemoryError) as exc:
        if not found:
            why = getattr(exc, "strerror", "") or str(exc)
            raise bad(f"The file cannot be read as {form}: {why[:200]}.", "file", "invalid_audio") from exc


def _claimed(container: Any, size: int) -> float:
    """Seconds, as the file says; where samples are not packed, as many as there can be: writers leave that open."""
    codec = container.streams.audio[0].codec_context
    if codec is None:
        raise bad("The sound is packed in a way that is not known here.", "file", "invalid_audio")
    if codec.name.startswith("pcm_"):
        return size * 8 / codec.bit_rate if codec.bit_rate else 0.0
    return container.duration / av.time_base if container.duration else 0.0


def _resampled(container: Any) -> Iterator[bytes]:
    stream = container.streams.audio[0]
    resampler: Any = None
    for frame in _frames(container, stream):
        if resampler is None:
            _check(frame)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        for made in resampler.resample(frame):
            yield made.to_ndarray().tobytes()
    for made in resampler.resample(None) if resampler is not None else ():
        yield made.to_ndarray().tobytes()


def _check(frame: Any) -> None:
    if not RATES[0] <= frame.sample_rate <= RATES[1]:
        raise bad(
            f"The sound has {frame.sample_rate} samples a second: {RATES[0]} to {RATES[1]} are read.",
            "file",
            "invalid_audio",
        )
    if not 1 <= frame.layout.nb_channels <= CHANNELS:
        raise bad(f"The sound has more than {CHANNELS} channels.", "file", "invalid_audio")


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames; one damaged packet is passed over."""
    damaged: Any = None
    good = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as exc:
            damaged = exc
            continue
        good = good or bool(frames)
        yield from frames
    if damaged is not None and not good:
        raise damaged
