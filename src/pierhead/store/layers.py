"""Which files the layers of an artifact are: their names in the model's folder, roles and formats; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import msgspec

from pierhead.errors import CorruptData
from pierhead.store.index import Descriptor
from pierhead.store.media import CNCF, FILEPATH, ROLE, SCALE, TITLE, Kind, kind_of
from pierhead.store.model import ModelFile

_NAMES = {"mmproj": "mmproj.gguf", "template": "template.jinja", "license": "LICENSE", "lora": "lora.gguf"}
_ENDINGS = {"onnx": ".onnx", "gguf": ".gguf", "safetensors": ".safetensors", "dduf": ".dduf"}
_TAR_ENDINGS = {"tar": ".tar", "tar+gzip": ".tar.gz", "tar+zstd": ".tar.zst"}


def check_filepath(path: str) -> str:
    """Return a relative path that stays inside its folder; CorruptData for any other."""
    parts = PurePosixPath(path).parts
    odd = any(ord(c) < 32 or c in "\\\x7f" for c in path)
    if not path or odd or len(path) > 1024 or path.startswith("/") or ".." in parts or not parts:
        raise CorruptData(f"a file of the model has a path that leaves its folder: {path[:100]!r}")
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts):
        raise CorruptData(f"a file of the model has a name that no folder can hold: {path[:100]!r}")
    return path


def config_of(data: bytes) -> dict[str, Any]:
    """An artifact's config; CorruptData where it is not a JSON object."""
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise CorruptData(f"the model's config cannot be read: {exc}") from exc


def files_of(layers: Sequence[Descriptor], config: Mapping[str, Any]) -> tuple[ModelFile, ...]:
    """The file of each layer; ``config`` is the artifact's own, which may tell the format of its weights.

    Layers without a path get one that tells what they are: ``model.gguf``, ``model-00001-of-00002.gguf``,
    ``mmproj.gguf``, ``template.jinja``, ``LICENSE``.
    """
    declared = _declared(config)
    kinds = [_kind(layer, declared) for layer in layers]
    paths = [layer.annotations.get(FILEPATH) or "" for layer in layers]
    shards: dict[str, int] = {}
    for path, kind in zip(paths, kinds, strict=True):
        if not path and kind.role == "weights":
            shards[kind.format] = shards.get(kind.format, 0) + 1
    taken = {path for path in paths if path}
    counted: dict[str, int] = {}
    files: list[ModelFile] = []
    for layer, path, kind in zip(layers, paths, kinds, strict=True):
        if path:
            name = check_filepath(path)
        else:
            counted[kind.format] = counted.get(kind.format, 0) + 1
            name = _free(_name(layer, kind, counted[kind.format], shards.get(kind.format, 1)), taken)
        scale = _scale(layer.annotations.get(SCALE, ""))
        files.append(
            ModelFile(name, layer.size, kind.role, layer.digest, kind.format, kind.packing, layer.media_type, scale)
        )
    return tuple(files)


def _kind(layer: Descriptor, declared: str) -> Kind:
    path = layer.annotations.get(FILEPATH, "") or layer.annotations.get(TITLE, "")
    role = layer.annotations.get(ROLE, "")
    kind = kind_of(layer.media_type, path, role) or Kind("other")
    untold = kind.role == "weights" and not role and layer.media_type.startswith(CNCF)
    if untold and "mmproj" in path.rsplit("/", 1)[-1].lower():  # a projector is weights there
        return kind._replace(role="mmproj")
    if kind.role == "weights" and not kind.format and kind.packing == "raw":
        return kind._replace(format=declared)
    return kind


def _declared(config: Mapping[str, Any]) -> str:
    """The format that the config of Docker's or CNCF's artifact tells."""
    about = config.get("config")
    value = cast("dict[str, Any]", about).get("format") if isinstance(about, dict) else None
    return value.lower() if isinstance(value, str) and len(value) <= 40 else ""


def _name(layer: Descriptor, kind: Kind, number: int, count: int) -> str:
    title = layer.annotations.get(TITLE, "")
    if title:  # what other tools call a file
        return check_filepath(title)
    if kind.packing != "raw":
        return f"{kind.role}{_TAR_ENDINGS[kind.packing]}"
    if kind.role == "weights":
        ending = _ENDINGS.get(kind.format, "")
        return f"model{ending}" if count == 1 else f"model-{number:05d}-of-{count:05d}{ending}"
    return _NAMES.get(kind.role) or layer.digest.removeprefix("sha256:")


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where another file has it."""
    stem, dot, ending = name.partition(".")
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{stem}-{number}{dot}{ending}"
    taken.add(found)
    return found


def _scale(text: str) -> float:
    try:
        value = float(text) if text else 1.0
    except ValueError:
        return 1.0
    return value if abs(value) <= 1000 else 1.0
