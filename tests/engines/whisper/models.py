"""Whisper models of next to nothing, in whisper.cpp's own format: they hear nothing and say what is written here.

Each has one layer on both sides. A token leads to the next one through the layer's feed-forward part alone, so the real
engine makes the same text of every sound.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from pathlib import Path

WIDTH = 64
LAYERS = 1
FILTERS = (80, 201)
WORDS = [" ", "!", ".", "?", " hello", " world", " how", " are", " you", " good", " day", " gr\u00fc\u00df", "e"]
_BEGIN, _PAUSE, _AFTER, _END = 0.0, 1.0, 1.02, 2.0
TRANSCRIPT = (_BEGIN, " hello", " world", ".", _PAUSE, _AFTER, " how", " are", " you", "?", _END)
TRANSLATION = (0.02, " good", " day", "!", _END)
TEXT = "hello world. how are you?"


def whisper(path: Path, *, multilingual: bool = True, vocabulary: int = 0) -> Path:
    """Write a model that says ``TRANSCRIPT``, and of a translation ``TRANSLATION``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words = vocabulary or (51865 if multilingual else 51864)
    sizes = (words, 1500, WIDTH, 1, LAYERS, 448, WIDTH, 1, LAYERS, FILTERS[0], 1)
    out = bytearray(struct.pack("<4s11i", b"lmgg", *sizes))
    out += struct.pack("<2i", *FILTERS) + bytes(4 * FILTERS[0] * FILTERS[1])
    out += struct.pack("<i", len(WORDS))
    for word in WORDS:
        out += struct.pack("<i", len(word.encode())) + word.encode()
    links = _links(multilingual)
    for name, shape, cells, gain in _tensors(words, links):
        matrix = len(shape) > 1 and not name.endswith("bias") and "positional" not in name
        out += struct.pack("<3i", len(shape), len(name), int(matrix)) + struct.pack(f"<{len(shape)}i", *shape[::-1])
        out += name.encode() + _numbers(shape, cells, gain, "e" if matrix else "f")
    path.write_bytes(out)
    return path


def _ids(multilingual: bool) -> dict[str | float, int]:
    """Numbers of the tokens that whisper.cpp gives a meaning to, and of the words."""
    first = 50257 if multilingual else 50256
    begin = first + 107
    special = {"<end>": first, "<start>": first + 1, "<en>": first + 2, "<de>": first + 4}
    special |= {"<translate>": begin - 6, "<transcribe>": begin - 5}
    times = {time: begin + round(time * 50) for time in (_BEGIN, 0.02, _PAUSE, _AFTER, _END)}
    return {**{word: number for number, word in enumerate(WORDS)}, **special, **times}


def _links(multilingual: bool) -> list[tuple[int, int]]:
    """Pairs of tokens: what follows what."""
    ids = _ids(multilingual)
    start = "<transcribe>" if multilingual else "<start>"
    chains: list[Sequence[str | float]] = [(start, *TRANSCRIPT, "<end>")]
    if multilingual:
        chains += [("<translate>", *TRANSLATION), ("<start>", "<en>")]
    return [(ids[one], ids[other]) for chain in chains for one, other in itertools.pairwise(chain)]


Cells = dict[tuple[int, ...], float]


def _tensors(words: int, links: list[tuple[int, int]]) -> list[tuple[str, tuple[int, ...], Cells, float]]:
    """Name, shape, the cells that are not zero, and what all are where that is one number."""
    place = {token: n for n, token in enumerate(dict.fromkeys(t for pair in links for t in pair))}
    assert len(place) <= WIDTH
    made: list[tuple[str, tuple[int, ...], Cells, float]] = []

    def add(name: str, *shape: int, cells: Cells | None = None, value: float = 0.0) -> None:
        made.append((name, shape, cells or {}, value))

    def norm(name: str, weight: float = 1.0) -> None:
        add(f"{name}.weight", WIDTH, value=weight)
        add(f"{name}.bias", WIDTH)

    def attention(name: str) -> None:
        norm(f"{name}_ln")
        for part in ("query", "key", "value", "out"):
            add(f"{name}.{part}.weight", WIDTH, WIDTH)
            if part != "key":
                add(f"{name}.{part}.bias", WIDTH)

    add("encoder.positional_embedding", 1500, WIDTH)
    for number, inputs in ((1, FILTERS[0]), (2, WIDTH)):
        add(f"encoder.conv{number}.weight", WIDTH, inputs, 3)
        add(f"encoder.conv{number}.bias", WIDTH, 1)
    norm("encoder.ln_post")
    add("decoder.positional_embedding", 448, WIDTH)
    add("decoder.token_embedding.weight", words, WIDTH, cells={(t, n): 1.0 for t, n in place.items()})
    norm("decoder.ln", 4.0)
    same: Cells = {(n, n): 1.0 for n in range(WIDTH)}
    following: Cells = {(place[other], place[one]): 10.0 for one, other in links}
    for side in ("encoder", "decoder"):
        block = f"{side}.blocks.0"
        attention(f"{block}.attn")
        if side == "decoder":
            attention(f"{block}.cross_attn")
        norm(f"{block}.mlp_ln")
        add(f"{block}.mlp.0.weight", 4 * WIDTH, WIDTH, cells=same if side == "decoder" else None)
        add(f"{block}.mlp.0.bias", 4 * WIDTH, value=-1.0)
        add(f"{block}.mlp.2.weight", WIDTH, 4 * WIDTH, cells=following if side == "decoder" else None)
        add(f"{block}.mlp.2.bias", WIDTH)
    return made


def _numbers(shape: tuple[int, ...], cells: Cells, value: float, kind: str) -> bytes:
    count = 1
    for size in shape:
        count *= size
    width = struct.calcsize(kind)
    data = bytearray(struct.pack(f"<{kind}", value) * count)
    for (row, column), number in cells.items():
        struct.pack_into(f"<{kind}", data, (row * shape[1] + column) * width, number)
    return bytes(data)
