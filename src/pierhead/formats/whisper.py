"""Headers of Whisper models in GGML files, as whisper.cpp has them: dimensions, languages, least size; pure."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from pierhead.formats.ggml import FILE_TYPES, TENSOR_TYPES, row_bytes
from pierhead.formats.reading import File, Reading, exactly, unusable

KIND = "GGML"
MAGIC = b"lmgg"  # 0x67676d6c in little-endian order
MULTILINGUAL = 51865  # words of the smallest vocabulary that has other languages than English
_HEADER = struct.Struct("<4s11i")
_MOST = {"vocab": 1 << 20, "ctx": 1 << 17, "state": 1 << 14, "head": 1 << 8, "layer": 1 << 8, "mels": 1 << 10}
_SIZES = {4: "tiny", 6: "base", 12: "small", 24: "medium", 32: "large"}  # by layers of the encoder
_TURBO = 4  # layers of the decoder where the encoder is a large one
_QUANTIZERS = 1000  # a file's type is that of its tensors and this times the version of the quantizer


class Header(NamedTuple):
    """A Whisper model's dimensions, in the order of the file."""

    n_vocab: int
    n_audio_ctx: int
    n_audio_state: int
    n_audio_head: int
    n_audio_layer: int
    n_text_ctx: int
    n_text_state: int
    n_text_head: int
    n_text_layer: int
    n_mels: int
    ftype: int

    @property
    def multilingual(self) -> bool:
        """Whether it knows other languages than English."""
        return self.n_vocab >= MULTILINGUAL

    @property
    def quantization(self) -> str:
        """As llama.cpp calls the type of most tensors."""
        return FILE_TYPES.get(self.ftype % _QUANTIZERS, "unknown")

    @property
    def matrices(self) -> int:
        """Elements of the tensors that may be quantized."""
        audio, text = self.n_audio_state, self.n_text_state
        return 12 * audio**2 * self.n_audio_layer + 16 * text**2 * self.n_text_layer + self.n_vocab * text

    @property
    def kernels(self) -> int:
        """Elements of the two convolutions."""
        return 3 * self.n_audio_state * (self.n_mels + self.n_audio_state)

    @property
    def vectors(self) -> int:
        """Elements of what always is float32: positions, biases, norms."""
        audio, text = self.n_audio_state, self.n_text_state
        layers = 13 * audio * self.n_audio_layer + 18 * text * self.n_text_layer
        return layers + self.n_audio_ctx * audio + self.n_text_ctx * text + 4 * audio + 2 * text

    @property
    def parameters(self) -> int:
        """All elements."""
        return self.matrices + self.kernels + self.vectors

    @property
    def least(self) -> int:
        """Bytes that its tensors take at least, whatever the quantizer left as it was."""
        kind = next((t for t in TENSOR_TYPES.values() if t.name == self.quantization.removesuffix("_M")), None)
        kernels = self.kernels * (4 if self.quantization == "F32" else 2)
        return (row_bytes(kind, self.matrices) if kind else 0) + kernels + 4 * self.vectors


def parse(data: bytes) -> Header:
    """The header at a file's beginning; CorruptData for what is none of Whisper's."""
    glance(data)
    if len(data) < _HEADER.size:
        unusable(KIND, f"it ends at byte {len(data)}, {_HEADER.size} are needed")
    header = Header(*_HEADER.unpack_from(data)[1:])
    for name, value in zip(Header._fields, header, strict=True):
        most = next((most for word, most in _MOST.items() if name.endswith(word)), 1 << 20)
        if not (0 if name == "ftype" else 1) <= value <= most:
            unusable(KIND, f"as a Whisper model it would have {name}={value}", "Only GGML files of Whisper are read.")
    if header.n_audio_state % header.n_audio_head or header.n_text_state % header.n_text_head:
        unusable(KIND, "its heads do not divide its width", "Only GGML files of Whisper are read.")
    return header


def glance(beginning: bytes) -> None:
    """CorruptData unless the first bytes are GGML's."""
    if not beginning.startswith(MAGIC):
        unusable(KIND, f"it starts with {beginning[:4]!r} instead of {MAGIC!r}")


def read_header(file: File) -> Reading[Header]:
    """A file's header; CorruptData where it is none, or where the file is too short for its tensors."""
    header = parse((yield from exactly(KIND, file, 0, _HEADER.size)))
    if file.size is not None and file.size < header.least:
        unusable(KIND, f"it has {file.size} bytes, its tensors need {header.least}: it is cut short")
    return header


def summary(header: Header, size: int) -> dict[str, Any]:
    """The part of a model's summary that its header knows."""
    label = _SIZES.get(header.n_audio_layer)
    return {
        "architecture": "whisper",
        "name": None,
        "size_label": "turbo" if label == "large" and header.n_text_layer == _TURBO else label,
        "layers": header.n_audio_layer + header.n_text_layer,
        "embedding_length": header.n_text_state,
        "heads": header.n_text_head,
        "context_length": header.n_text_ctx,
        "vocab_size": header.n_vocab,
        "parameters": header.parameters,
        "quantization": header.quantization,
        "weights_bytes": size,
        "whisper": {**header._asdict(), "multilingual": header.multilingual},
    }
