"""Manifest and config of a model as they are written: Docker's artifact, v0.1 and v0.2, and CNCF ModelPack; pure.

Sources: the model specification and the code of Docker Model Runner, and the CNCF model-spec with its JSON schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import msgspec

from pierhead.formats.estimate import estimate
from pierhead.formats.pictures import TYPE
from pierhead.formats.pictures_estimate import estimate as estimate_picture
from pierhead.formats.pictures_estimate import usual_pixels
from pierhead.store.media import (
    CNCF,
    CNCF_ARTIFACT,
    CNCF_CONFIG,
    CONFIG,
    CONFIG_V02,
    CREATED,
    FILE_METADATA,
    FILEPATH,
    MANIFEST,
    MEMORY,
    ROLE,
    SCALE,
    SETTINGS,
    TITLE,
    UNTESTED,
    docker_type,
    needs_role,
)
from pierhead.store.model import ModelFile, Packaged

Format = Literal["docker-v0.1", "docker-v0.2", "cncf"]
EPOCH = "1970-01-01T00:00:00Z"
_FULL_CONTEXT = 1 << 17  # tokens; beyond this a cache grows by the same bytes for each token
_CONTEXT = 8192  # tokens that the estimate is for where the model has more
_CNCF_TYPES = {
    **dict.fromkeys(("weights", "draft", "lora", "mmproj"), "weight"),
    **dict.fromkeys(("license", "doc"), "doc"),
    "code": "code",
    "dataset": "dataset",
}
# CNCF's words for the types of numbers that weights are made of.
_PRECISIONS = {
    **{"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2", "C64": "complex64"},
    **{f"{kind}{bits}": f"{word}{bits}" for kind, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}
_KNOWN_PRECISIONS = frozenset(_PRECISIONS.values())


class Documents(NamedTuple):
    """The bytes of both, for ``Store.commit_artifact``."""

    manifest: bytes
    config: bytes


@dataclass(frozen=True)
class About:
    """What is written about a model: ``created`` is RFC 3339, ``header`` the metadata of its weights as text.

    ``diff_ids`` are those of layers that are compressed, ``layers`` further annotations of layers, by their digests.
    """

    summary: Mapping[str, Any]
    created: str
    packaged: Packaged = Packaged()
    annotations: Mapping[str, str] = field(default_factory=dict[str, str])
    header: Mapping[str, str] = field(default_factory=dict[str, str])
    name: str = ""
    diff_ids: Mapping[str, str] = field(default_factory=dict[str, str])
    layers: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])


def write(format: Format, files: Sequence[ModelFile], about: About) -> Documents:
    """The documents of a model of these files (whose blobs are in a store), in this order."""
    memory = memory_annotation(about.summary, files, about.packaged.context)
    layers = [_layer(format, file, memory, about.layers.get(file.digest, {})) for file in files]
    diff_ids = [about.diff_ids.get(file.digest, file.digest) for file in files]
    if format == "cncf":
        config, kind, artifact = _cncf_config(about, diff_ids), CNCF_CONFIG, CNCF_ARTIFACT
    else:
        kind = CONFIG if format == "docker-v0.1" else CONFIG_V02
        config, artifact = _docker_config(files, about, diff_ids), kind
    settings = msgspec.json.encode(about.packaged, order="sorted").decode()
    told = {CREATED: about.created, **({} if settings == "{}" else {SETTINGS: settings}), **about.annotations}
    encoded = msgspec.json.encode(config, order="sorted")
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact,
        "config": {"mediaType": kind, "digest": digest_of(encoded), "size": len(encoded)},
        "layers": layers,
        "annotations": dict(sorted(told.items())),
    }
    return Documents(msgspec.json.encode(manifest), encoded)


def digest_of(data: bytes) -> str:
    """``sha256:…`` of a document."""
    import hashlib

    return "sha256:" + hashlib.sha256(data).hexdigest()


def media_type(format: Format, file: ModelFile) -> str:
    """The layer's type in this specification; an archive keeps the type that it has."""
    if file.packing != "raw":
        return file.media_type
    if format == "cncf":
        return f"{CNCF}{_CNCF_TYPES.get(file.role, 'weight.config')}.v1.raw"
    return docker_type(file.role, file.format)


def _layer(format: Format, file: ModelFile, memory: str, further: Mapping[str, str]) -> dict[str, Any]:
    kind = media_type(format, file)
    told = {FILEPATH: file.name, TITLE: file.name} if file.packing == "raw" else {}
    told |= {FILE_METADATA: _file_metadata(file), UNTESTED: "false"}
    if file.packing == "raw" and needs_role(kind, file.name, file.role):
        told[ROLE] = file.role
    if file.role == "lora" and file.scale != 1.0:
        told[SCALE] = f"{file.scale:g}"
    if file.role == "weights" and memory:
        told[MEMORY] = memory
    return {"mediaType": kind, "digest": file.digest, "size": file.size, "annotations": {**told, **further}}


def _file_metadata(file: ModelFile) -> str:
    """A file's attributes, the same for everybody: whose it was and when is nothing that a model is made of."""
    name = file.name.rsplit("/", 1)[-1]
    about = {"name": name, "mode": 0o644, "uid": 0, "gid": 0, "size": file.size, "mtime": EPOCH, "typeflag": 48}
    return msgspec.json.encode(about).decode()


# --- what a scheduler reads ---------------------------------------------------------------------------------------


def memory_annotation(summary: Mapping[str, Any], files: Sequence[ModelFile], context: int = 0) -> str:
    """The memory of the whole model, as JSON: bytes, and ``kv_per_token`` for each further token of a long context.

    ``kv_cache`` and ``compute`` are for ``context`` tokens and one request at a time.
    """
    if not summary.get("weights_bytes"):
        return ""
    if summary.get("type") == TYPE:
        pixels = usual_pixels(str(summary.get("architecture")))
        kept = {key: summary.get(key) for key in ("parameters", "format")}
        return msgspec.json.encode(
            {**estimate_picture(summary, pixels=pixels).to_dict(), "pixels": pixels, **kept}
        ).decode()
    tokens = context or min(int(summary.get("context_length") or _CONTEXT), _CONTEXT)
    extra = sum(f.size for f in files if f.role in ("lora", "draft"))
    projector = sum(f.size for f in files if f.role == "mmproj")
    need = estimate(summary, context=tokens, extra_weights=extra, projector=projector)
    far = estimate(summary, context=2 * _FULL_CONTEXT).kv_cache - estimate(summary, context=_FULL_CONTEXT).kv_cache
    told = {
        "weights": need.weights,
        "kv_per_token": far // _FULL_CONTEXT,
        "kv_cache": need.kv_cache,
        "compute": need.compute,
        "overhead": need.overhead,
        "total": need.total,
        "context": tokens,
        "context_length": summary.get("context_length"),
        "layers": summary.get("layers"),
        "parameters": summary.get("parameters"),
        "format": summary.get("format"),
    }
    return msgspec.json.encode({k: v for k, v in told.items() if v is not None}).decode()


# --- configs ------------------------------------------------------------------------------------------------------


def _docker_config(files: Sequence[ModelFile], about: About, diff_ids: Sequence[str]) -> dict[str, Any]:
    summary = about.summary
    kind = str(summary.get("format") or "gguf")
    config: dict[str, Any] = {
        "format": kind,
        "quantization": str(summary.get("quantization") or ""),
        "parameters": human_count(summary.get("parameters")),
        "architecture": "diffusers" if kind == "dduf" else str(summary.get("architecture") or ""),
        "size": human_size(sum(f.size for f in files if f.role == "weights")),
    }
    if kind == "gguf":
        config["gguf"] = dict(about.header)
    elif kind == "safetensors":
        config["safetensors"] = {"tensor_count": str(summary.get("tensor_count") or 0), **about.header}
    elif kind == "dduf":
        file = next((f.name for f in files if f.format == "dduf"), "")
        config["diffusers"] = {"layout": "dduf", "dduf_file": file.rsplit("/", 1)[-1]}
    context = about.packaged.context or summary.get("context_length")
    if isinstance(context, int) and 0 < context < 1 << 31:
        config["context_size"] = context
    return {
        "config": {k: v for k, v in config.items() if v != ""},
        "descriptor": {"created": about.created},
        "rootfs": {"type": "rootfs", "diff_ids": list(diff_ids)},
        "ai.pierhead.summary": dict(summary),
    }


def _cncf_config(about: About, diff_ids: Sequence[str]) -> dict[str, Any]:
    summary = about.summary
    share = cast("dict[str, int]", summary.get("dtypes") or {})
    words = [_PRECISIONS.get(name, name) for name in sorted(share, key=lambda n: (-share[n], n))]
    precision = ",".join(word for word in dict.fromkeys(words) if word in _KNOWN_PRECISIONS)
    quantization = str(summary.get("quantization") or "")
    licence = summary.get("license")
    name = summary.get("name") or about.name
    descriptor = {
        "createdAt": about.created,
        "family": str(summary.get("architecture") or ""),
        "name": str(name or ""),
        "licenses": [licence] if isinstance(licence, str) and licence else [],
    }
    config = {
        "architecture": str(summary.get("architecture") or ""),
        "format": str(summary.get("format") or "gguf"),
        "paramSize": human_count(summary.get("parameters"), 1).lower(),
        "precision": precision,
        "quantization": "" if quantization in share else quantization,
    }
    return {
        "descriptor": {k: v for k, v in descriptor.items() if v},
        "config": {k: v for k, v in config.items() if v},
        "modelfs": {"type": "layers", "diffIds": list(diff_ids)},
    }


def human_count(count: Any, places: int = 2) -> str:
    """Parameters as people write them: ``134.52M``; empty where there are none."""
    value = float(count) if isinstance(count, int) else 0.0
    for unit in ("", "K", "M", "B", "T"):
        if value < 999.995:
            return f"{_plain(value, places)}{unit}" if value else ""
        value /= 1000
    return f"{_plain(value, places)}Q"


def human_size(size: int) -> str:
    """Bytes as Docker writes them: ``98.31MiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1023.995:
            return f"{_plain(value, 2)}{unit}"
        value /= 1024
    return f"{_plain(value, 2)}TiB"


def _plain(value: float, places: int) -> str:
    return re.sub(r"\.?0+$", "", f"{value:.{places}f}") if places else f"{value:.0f}"
