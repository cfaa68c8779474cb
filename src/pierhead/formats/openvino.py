"""What OpenVINO's graphs tell of a model that writes: what it caches for each token, and its chat template; pure."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from pierhead.formats.reading import Ask, File, Reading, unusable

MAX_GRAPH = 512 << 20
MAX_TEMPLATE = 1 << 20
MODEL = "openvino_model.xml"
_STEP = 1 << 20
_OVERLAP = 4096
_CACHED = re.compile(
    rb'variable_id="past_key_values\.(\d{1,5})\.(key|value)[^"]{0,200}"[^>]{0,200}variable_shape="([^"]{0,200})"'
)
_TEMPLATE = re.compile(rb'<chat_template value="([^"]*)"')


def glance(beginning: bytes) -> None:
    """CorruptData unless the first bytes are those of an XML document."""
    if not beginning.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        unusable("OpenVINO", f"it starts with {beginning[:8]!r}")


def read_model(graphs: Sequence[File], weights: Sequence[File]) -> Reading[dict[str, Any]]:
    """The part of a summary that the graphs know; CorruptData where one lacks its numbers."""
    sizes = {file.name: file.size or 0 for file in weights}
    for graph in graphs:
        if f"{graph.name.removesuffix('.xml')}.bin" not in sizes:
            unusable("OpenVINO", f"{graph.name} is there without its .bin", "Get that file as well.")
    found: dict[str, Any] = {"weights_bytes": sum(size for name, size in sizes.items() if name.endswith(".bin"))}
    model = next((g for g in graphs if g.name.rpartition("/")[2] == MODEL), None)
    if model is not None:
        found |= _cache((yield from _search(model, _CACHED)))
    tokenizer = next((g for g in graphs if g.name.endswith("openvino_tokenizer.xml")), None)
    if tokenizer is not None:
        templates = yield from _search(tokenizer, _TEMPLATE, MAX_TEMPLATE)
        if templates:
            found["chat_template"] = html.unescape(templates[0][1].decode("utf-8", "replace"))[:MAX_TEMPLATE]
    return found


def _cache(variables: Sequence[re.Match[bytes]]) -> dict[str, Any]:
    """How many layers keep keys and values, and how large those of one token are."""
    layers: set[int] = set()
    shapes: dict[bytes, tuple[int, int]] = {}
    for variable in variables:
        numbers = [int(n) for n in re.findall(rb"\d+", variable[3])]
        if len(numbers) != 2 or max(numbers) > 1 << 20:
            continue
        layers.add(int(variable[1]))
        shapes[variable[2]] = (numbers[0], numbers[1])
    if not layers or set(shapes) != {b"key", b"value"}:
        return {"layers": 0}
    return {
        "layers": len(layers),
        "heads_kv": shapes[b"key"][0],
        "head_dim_k": shapes[b"key"][1],
        "head_dim_v": shapes[b"value"][1],
    }


def _search(file: File, pattern: re.Pattern[bytes], overlap: int = _OVERLAP) -> Reading[list[re.Match[bytes]]]:
    """All matches in a file that is read in pieces."""
    found: dict[tuple[bytes, ...], re.Match[bytes]] = {}
    kept, offset = b"", 0
    while offset < MAX_GRAPH:
        data = yield Ask(file.name, offset, _STEP)
        if not data:
            break
        offset += len(data)
        kept += data
        for match in pattern.finditer(kept):
            found.setdefault(match.groups(), match)
        kept = kept[-overlap:]
    return list(found.values())
