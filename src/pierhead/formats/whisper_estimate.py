"""How much memory a Whisper model takes when whisper.cpp serves it: weights, caches, scratch, the sound; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pierhead.formats.whisper import Header

PROGRAM = 96 << 20  # resident, with a model of next to nothing: Python, NumPy, the decoder of sound
PIECE = 600  # seconds of sound that are worked on at a time
_SOUND = 16_000 * 8 + 100 * 4 * 128  # bytes for a second: samples, whisper.cpp's copy of them, the spectrum
_PAD = 256  # entries of a cache are a multiple of this
_HALF, _FLOAT = 2, 4  # bytes


@dataclass(frozen=True)
class WhisperEstimate:
    """Bytes. ``weights``, ``kv_cache`` and ``compute`` are those of all workers; each has its own."""

    weights: int
    kv_cache: int
    compute: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.compute + self.overhead

    def to_dict(self) -> dict[str, int]:
        """JSON-safe form: the parts and their ``total``."""
        return {**asdict(self), "total": self.total}


def estimate_whisper(
    metadata: Mapping[str, Any], *, size: int, workers: int, decoders: int, seconds: int, body: int
) -> WhisperEstimate:
    """``size`` and ``body`` are bytes of the file and of a request, ``decoders`` texts that are tried at a time."""
    shape = metadata.get("whisper")
    sound = _SOUND * min(seconds, PIECE) + body
    if not isinstance(shape, Mapping):
        return WhisperEstimate(size * workers, 0, workers * ((256 << 20) + sound), PROGRAM)
    header = Header(*(int(shape[name]) for name in Header._fields))  # pyright: ignore[reportUnknownArgumentType]
    cache, scratch = _caches(header, decoders), _scratch(header, decoders)
    return WhisperEstimate(size * workers, cache * workers, workers * (scratch + sound), PROGRAM)


def _caches(header: Header, decoders: int) -> int:
    """What the decoder keeps of its words and of the sound, and the pad that flash attention needs."""
    cells = _padded(header.n_text_ctx) * (decoders + 2 if decoders > 1 else 1)
    row = 2 * header.n_text_state * _HALF
    heard = _padded(header.n_audio_ctx)
    return row * header.n_text_layer * (cells + heard) + 2 * header.n_audio_state * heard * _HALF


def _scratch(header: Header, decoders: int) -> int:
    """Buffers of the four graphs; the largest holds what each word of the context says about each of the vocabulary."""
    audio, frames = header.n_audio_state, 2 * header.n_audio_ctx
    conv = frames * _FLOAT * (header.n_mels * 2 + audio * 2 + audio // 2)
    encode = header.n_audio_ctx * audio * _FLOAT * 8
    across = header.n_audio_ctx * audio * _FLOAT * 3 // 2
    words = header.n_text_ctx * _FLOAT * (header.n_vocab + 4 * header.n_text_state)
    return conv + encode + across + words + decoders * 3 * header.n_vocab * _FLOAT


def _padded(cells: int) -> int:
    return -(-cells // _PAD) * _PAD
