"""Writes OpenAI's Whisper from CTranslate2's files in the form that whisper.cpp reads: FOLDER, TARGET.

FOLDER holds ``model.bin`` (or ``model.bin.part1`` and so on) and ``tokenizer.json``, as faster-whisper's models do. Run
with a Python that has NumPy.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

WORDS = 50257  # of the vocabulary of text; whisper.cpp knows the others
KINDS = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}


class Reader:
    """CTranslate2's variables by name."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0
        self._number("I")
        self._word()
        self._number("I")
        self.variables: dict[str, np.ndarray] = {}
        for _ in range(self._number("I")):
            name = self._word()
            shape = [self._number("I") for _ in range(self._number("B"))]
            kind, size = np.dtype(KINDS[self._number("B")]), self._number("I")
            found = np.frombuffer(data, kind, size // kind.itemsize, self._place)
            self.variables[name] = found.reshape(shape)
            self._place += size

    def _number(self, kind: str) -> int:
        (found,) = struct.unpack_from(f"<{kind}", self._data, self._place)
        self._place += struct.calcsize(kind)
        return found

    def _word(self) -> str:
        length = self._number("H")
        found = self._data[self._place : self._place + length - 1].decode()
        self._place += length
        return found


class Writer:
    """GGML's tensors one after the other."""

    def __init__(self, out: BinaryIO, variables: dict[str, np.ndarray]) -> None:
        self._out = out
        self._variables = variables

    def tensor(self, name: str, data: np.ndarray, *, half: bool | None = None) -> None:
        half = data.ndim > 1 if half is None else half
        head = struct.pack("<3i", data.ndim, len(name), int(half))
        self._out.write(head + struct.pack(f"<{data.ndim}i", *data.shape[::-1]) + name.encode())
        self._out.write(data.astype("<f2" if half else "<f4").tobytes())

    def norm(self, source: str, target: str) -> None:
        self.tensor(f"{target}.weight", self._variables[f"{source}/gamma"])
        self.tensor(f"{target}.bias", self._variables[f"{source}/beta"])

    def linear(self, source: str, target: str) -> None:
        self.tensor(f"{target}.weight", self._variables[f"{source}/weight"])
        self.tensor(f"{target}.bias", self._variables[f"{source}/bias"])

    def attention(self, source: str, target: str) -> None:
        """Their projections of queries, keys and values lie in fewer tensors, one below the other."""
        self.norm(f"{source}/layer_norm", f"{target}_ln")
        weights: list[np.ndarray] = []
        biases: list[np.ndarray] = []
        number = 0
        while (found := self._variables.get(f"{source}/linear_{number}/weight")) is not None:
            parts = len(found) // found.shape[1]
            weights += np.split(found, parts)
            biases += np.split(self._variables[f"{source}/linear_{number}/bias"], parts)
            number += 1
        for part, weight, bias in zip(("query", "key", "value", "out"), weights, biases, strict=True):
            self.tensor(f"{target}.{part}.weight", weight)
            if part != "key":  # keys have none
                self.tensor(f"{target}.{part}.bias", bias)


def vocabulary(path: Path) -> list[bytes]:
    """The words' bytes: GPT-2's tokenizers write each byte as a character that can be printed."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [n for n in range(256) if n not in kept]
    byte = {chr(n): n for n in kept} | {chr(256 + place): n for place, n in enumerate(others)}
    words = json.loads(path.read_text())["model"]["vocab"]
    ordered = sorted((number, word) for word, number in words.items() if number < WORDS)
    return [bytes(byte[c] for c in word) for _, word in ordered]


def filters(count: int, bins: int = 201, rate: int = 16_000) -> np.ndarray:
    """Slaney's mel filters, which OpenAI took from librosa."""
    knee = 1000.0  # Hz, from which on the scale is a logarithm
    step = np.log(6.4) / 27
    marks = np.linspace(0, 15 + np.log(rate / 2 / knee) / step, count + 2)
    edges = np.where(marks >= 15, knee * np.exp((marks - 15) * step), marks * 200 / 3)
    slopes = edges[:, None] - np.linspace(0, rate / 2, bins)[None]
    widths = np.diff(edges)
    rows = np.maximum(0, np.minimum(-slopes[:-2] / widths[:-1, None], slopes[2:] / widths[1:, None]))
    return (rows * (2 / (edges[2:] - edges[:-2]))[:, None]).astype("<f4")


def convert(folder: Path, target: Path) -> None:
    parts = sorted(folder.glob("model.bin*"))
    found = Reader(b"".join(part.read_bytes() for part in parts)).variables
    words, width = found["decoder/embeddings/weight"].shape
    heads, layers = int(found["encoder/num_heads"]), sum(name.endswith("/ffn/linear_0/weight") for name in found) // 2
    mels = found["encoder/conv1/weight"].shape[1]
    with target.open("wb") as out:
        side = (width, heads, layers)
        out.write(struct.pack("<4s11i", b"lmgg", words, 1500, *side, 448, *side, mels, 1))
        out.write(struct.pack("<2i", mels, 201) + filters(mels).tobytes())
        known = vocabulary(folder / "tokenizer.json")
        out.write(struct.pack("<i", len(known)) + b"".join(struct.pack("<i", len(word)) + word for word in known))
        write = Writer(out, found)
        for name in ("encoder", "decoder"):
            write.tensor(f"{name}.positional_embedding", found[f"{name}/position_encodings/encodings"], half=False)
        for number in (1, 2):
            write.tensor(f"encoder.conv{number}.weight", found[f"encoder/conv{number}/weight"])
            write.tensor(f"encoder.conv{number}.bias", found[f"encoder/conv{number}/bias"][:, None], half=False)
        write.norm("encoder/layer_norm", "encoder.ln_post")
        write.norm("decoder/layer_norm", "decoder.ln")
        write.tensor("decoder.token_embedding.weight", found["decoder/embeddings/weight"])
        for name in ("encoder", "decoder"):
            for number in range(layers):
                source, block = f"{name}/layer_{number}", f"{name}.blocks.{number}"
                write.attention(f"{source}/self_attention", f"{block}.attn")
                if name == "decoder":
                    write.attention(f"{source}/attention", f"{block}.cross_attn")
                write.norm(f"{source}/ffn/layer_norm", f"{block}.mlp_ln")
                write.linear(f"{source}/ffn/linear_0", f"{block}.mlp.0")
                write.linear(f"{source}/ffn/linear_1", f"{block}.mlp.2")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
