"""Sound files of all kinds: tones, written by the standard library, or by FFmpeg in the engine's own environment."""

from __future__ import annotations

import math
import struct
import subprocess
from pathlib import Path

RATE = 16_000
PCM, FLOAT = 1, 3
_ENCODE = """
import sys
import av
import numpy as np
path, form, codec, rate, layout = sys.argv[1:]
rate = int(rate)
tone = (np.sin(np.arange(rate * 3) * 440 * 2 * np.pi / rate) * 8000).astype(np.int16)
frame = av.AudioFrame.from_ndarray(np.stack([tone] * 2), format="s16p", layout="stereo")
frame.sample_rate = rate
with av.open(path, "w", format=form) as out:
    stream = out.add_stream(codec, rate=rate, layout=layout)
    resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.codec_context.frame_size or 1024)
    for made in (*resampler.resample(frame), *resampler.resample(None)):
        out.mux(stream.encode(made))
    out.mux(stream.encode(None))
"""


def wav(seconds: float = 2.5, *, rate: int = RATE, channels: int = 1, bits: int = 16, kind: int = PCM) -> bytes:
    """A tone as WAV: 8, 16, 24 or 32 bits, or float of 32 or 64."""
    count = round(seconds * rate)
    block = _samples(min(count, rate), rate, channels, bits, kind)
    data = (block * (count // rate + 1))[: count * channels * bits // 8]
    return header(len(data), rate=rate, channels=channels, bits=bits, kind=kind) + data


def header(size: int, *, rate: int = RATE, channels: int = 1, bits: int = 16, kind: int = PCM) -> bytes:
    """That of a WAV file with so many bytes of samples."""
    width = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, rate * width % (1 << 32), width, bits)
    return (
        struct.pack("<4sI4s", b"RIFF", min(size + 36, (1 << 32) - 1), b"WAVE")
        + form
        + struct.pack("<4sI", b"data", size)
    )


def _samples(count: int, rate: int, channels: int, bits: int, kind: int) -> bytes:
    made = bytearray()
    for n in range(count):
        value = math.sin(n * 440 * 2 * math.pi / rate) * 0.25
        made += _sample(value, bits, kind) * channels
    return bytes(made)


def _sample(value: float, bits: int, kind: int) -> bytes:
    if kind == FLOAT:
        return struct.pack("<f" if bits == 32 else "<d", value)
    if bits == 8:
        return bytes([round(value * 127) + 128])
    return round(value * ((1 << (bits - 1)) - 1)).to_bytes(bits // 8, "little", signed=True)


def encoded(python: Path, folder: Path, form: str, codec: str, rate: int = 48_000, layout: str = "stereo") -> bytes:
    """Three seconds of a tone in any of FFmpeg's forms."""
    target = folder / f"tone.{form}"
    subprocess.run(
        [str(python), "-c", _ENCODE, str(target), form, codec, str(rate), layout],
        check=True,
        timeout=60,
        capture_output=True,
    )
    return target.read_bytes()
